"""How the embedded model was made: `python -m raydiff.assets.recipe`, from openly licensed emoji art to `emoji/`.

render -> tokenizer -> vae -> clip -> aesthetic -> classifiers -> diffusion -> export -> evaluate
"""
