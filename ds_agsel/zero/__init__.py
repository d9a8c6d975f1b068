"""DeepSpeed's ZeRO optimizers, restricted to the param groups of the selected blocks."""
