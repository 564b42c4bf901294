"""multimodal_sd_modelslim_v1 recipes: diffusion transformers for Slim."""
