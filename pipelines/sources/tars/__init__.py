"""Archives of images: their members, and the layout of WebDataset."""
