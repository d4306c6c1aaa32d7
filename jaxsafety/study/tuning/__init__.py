"""Fine-tuning of Hugging Face checkpoints: adapters or all parameters, by the methods of the synthetic study."""
