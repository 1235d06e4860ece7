"""One library for every page: blocks of HTML, charts and their style."""
