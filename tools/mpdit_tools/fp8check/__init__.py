"""``mpdit fp8check``: what does FP8 do to this model, at this width and at wider ones?"""
