def check_image(data, limits, param):
    from PIL import Image; import io
    im = Image.open(io.BytesIO(data)); return im.format, im.width, im.height
