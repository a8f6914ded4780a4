"""Every reader and writer of weights: published names, timm's, torchvision's, export formats, model cards."""
