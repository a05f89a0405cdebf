# CPU:  docker build -t w2vrep .
# GPU:  docker build -t w2vrep:gpu --build-arg TORCH=https://pypi.org/simple .
# Run:  docker run --rm -v "$PWD/runs:/workspace/runs" w2vrep run demo --jobs 2
#       docker run --rm --gpus all -v "$PWD/runs:/workspace/runs" -v /path/to/LibriSpeech:/data:ro w2vrep:gpu \
#         run corrected --set data.root=/data
FROM python:3.12-slim

# Where torch comes from: the wheels for CPUs, or PyPI, whose wheels are for CUDA.
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir torch torchaudio --index-url "$TORCH"

WORKDIR /opt/w2vrep
COPY pyproject.toml README.md LICENSE ./
COPY reproduce reproduce
COPY recipes recipes
COPY results/published results/published
RUN pip install --no-cache-dir '.[tensorboard]' && w2vrep ls

# Models of the hub, and fonts' caches, by whatever user it runs as.
ENV HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /workspace
ENTRYPOINT ["w2vrep"]
CMD ["--help"]
