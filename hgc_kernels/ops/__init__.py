"""One folder an op: api.py (the public function), ops.py (schema, fake, registration), reference.py
(eager PyTorch).
"""
