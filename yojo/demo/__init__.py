"""A demonstration that runs on a CPU: a tiny vision-language model and handwritten digits to reward it on."""
