"""Packaging of jaxrl; run-time needs are in install_requires, everything else is an extra."""

from setuptools import find_packages, setup

# Without a bound pip takes an s3fs of 2020, which knows no asyncio, rather than an older botocore.
GCS, S3 = "gcsfs>=2025.2", "s3fs>=2025.2"

setup(
    name="jaxrl",
    version="0.1.0",
    description="Length-aware reinforcement learning with verifiable rewards for reasoning models, in JAX",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxrl", "jaxrl.*", "models", "models.*", "configs", "configs.*"]),
    package_data={"jaxrl.reporting": ["*.js", "*.css"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "etils[epath]",
        "fsspec",
        "grain>=0.2",
        "httpx",
        "ml-collections>=1.0",
        "absl-py",
        "numpy",
        "transformers>=4.53",
        "tokenizers",
        "sentencepiece",
        "jinja2",
        "protobuf",
        "safetensors",
        "math-verify>=0.8",
        "pyarrow",
        "pyyaml",
        "rich",
        "scipy",
        "tensorboardX",
        "matplotlib",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10", GCS],
        "cuda": ["jax[cuda]>=0.10"],
        "gcs": [GCS],
        "s3": [S3],
        "wandb": ["wandb"],
        "hub": ["datasets"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", GCS, S3, "gcp-storage-emulator",
                 "moto[s3,server]", "tensorboard"],
    },
)
