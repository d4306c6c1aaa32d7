"""Other people's formats: weights and configurations of models that were not trained here."""
