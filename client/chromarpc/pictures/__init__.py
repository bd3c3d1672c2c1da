"""Pictures that say what they were drawn with: read, explained, compared. Knows no server.

`files.py` takes texts out of PNG, JPEG and WebP within limits, `exif.py` and `xmp.py` out of what those hold.
`facts.py` is what is known of a picture, by the request's names; `recorded.py`, `a1111.py`, `comfyui.py` and
`training_sample.py` make it of what each program says, `requests.py` a request of it; `opened.py` chooses among
them. `comparison.py` says what differs, and alone decodes pixels.
"""
