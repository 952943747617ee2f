"""The networks beside the GPT of model.py: two baselines, and any causal model of the Hugging Face hub."""
