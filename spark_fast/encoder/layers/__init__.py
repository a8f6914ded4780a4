"""How each kind of layer runs on visible patches."""
