"""Images of any number of channels and any depth: decoded as stored, measured, scaled and normalised."""
