"""How the embedded model was made: `python -m raydiff.assets.recipe`, from openly licensed emoji art to `emoji/`.

words -> render -> tokenizer -> vae -> clip -> aesthetic -> classifier -> diffusion -> export -> evaluate
"""
