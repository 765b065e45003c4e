"""One evaluation of a patched model: which run it is of, what is decided, what is computed."""
