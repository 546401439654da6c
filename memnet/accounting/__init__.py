"""What memory a training needs: measured as it runs, or foretold from shapes alone."""
