"""The server: models over HTTP, in the forms of OpenAI's interface.

A request goes through the files in this order. `guard` refuses what is too large, has no key or comes from elsewhere;
`requests` says what may be asked; `prepare` makes a `job` of it: tokens, and how each text is drawn. The `scheduler`'s
one thread owns the engines: it admits texts from a `queue` that is fair to all clients, has a `lane` for each model,
which reads prompts piece by piece (`prefill`, helped by the prefix `cache`) and writes several texts together
(`writing`, where it is `guided`, by tokens that a grammar allows). What comes of them goes through a `delivery` to the
event loop, and from there as `completions` or `chat` to the client. `app` puts it together, `main` runs it.
"""
