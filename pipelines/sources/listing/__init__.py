"""What a folder tree or a list holds, before anything is read: names, links, splits, labels."""
