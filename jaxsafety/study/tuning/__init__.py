"""Fine-tuning of Hugging Face checkpoints: adapters or all parameters, by the objectives of the synthetic study."""
