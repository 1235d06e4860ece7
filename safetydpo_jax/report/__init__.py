"""One library for every page: templates, pictures, charts, numbers and their style."""
