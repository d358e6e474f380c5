"""LLaVA-OneVision: an image by itself is cut into tiles, several are not; tensors are padded to the most tiles."""

from yojo.families.family import Family, Tower, all_patches, patch_size, tile_grids


def anyres_grids(config, tensors):
    """A tile is a frame; how many an image has depends on its size and on whether it is alone."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    size, grids = config.vision_config.image_size, []
    side = size // patch_size(config)
    if "pixel_values" in tensors:
        sizes = tensors["image_sizes"].tolist()
        counts = tensors["batch_num_images"].tolist() if "batch_num_images" in tensors else [1] * len(sizes)
        alone = [count == 1 for count in counts for _ in range(count)]
        for image, cut in zip(sizes, alone, strict=True):
            tiles = image_size_to_num_patches(image, config.image_grid_pinpoints, size) if cut else 1
            grids.append((int(tiles), side, side))
    if "pixel_values_videos" in tensors:
        grids += tile_grids(config, {"pixel_values_videos": tensors["pixel_values_videos"]})
    return grids


FAMILIES = (
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        decoders=("qwen2",),
        takes=("image", "video"),
        padded={"pixel_values": (1,)},
        features="replaced",
        uncounted="tiles are cut to the image's own shape and resized where they are many, which the model's code does",
        sizes=("image_sizes", "batch_num_images"),
        tower=Tower(anyres_grids, all_patches),
    ),
)

DECODERS = ()
