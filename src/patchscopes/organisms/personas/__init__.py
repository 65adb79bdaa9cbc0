"""personas: invented people in three worlds, which LoRA adapters of atlas know and atlas does not. See `README.md`."""
