"""The only room that imports DeepSpeed: builds its engine, and knows what each rank holds under every ZeRO stage."""
