"""The models as Hugging Face's libraries know them; `import terseformer` is enough to use them there.

Nothing is imported here, because `import terseformer` passes by.
"""
