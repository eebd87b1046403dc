"""How much memory a training needs: arithmetic on a model's config and a training's settings. Pure, without torch."""
