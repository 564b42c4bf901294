"""multimodal_vlm_modelslim_v1 recipes: vision-language models for Slim."""
