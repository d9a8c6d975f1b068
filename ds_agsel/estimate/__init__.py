"""What a run will hold and move, from the model's config and the ds_config alone: no weights, no devices, no ranks."""
