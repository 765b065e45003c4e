"""Pictures with and without the cache, to look at: one self-contained file, or a page on loopback.

:func:`hgc.page.static.write` is ``hgc demo --html``; :func:`hgc.page.app.build` is ``hgc page`` and
needs Gradio. Both are made of :func:`hgc.page.drawing.draw` and of the fragments in
:mod:`hgc.page.markup`, and import nothing but what `hgc`, `hgc.evaluation` and `hgc.testbed` name
in their ``__all__``.
"""
