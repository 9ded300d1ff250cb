# The worker's image: one binary on a slim Debian, no Python, no CUDA toolkit. Built with CUDA 12.8, so that drivers from 570 on run it.
#     docker build --platform linux/amd64 -t brightrun .

FROM nvidia/cuda:12.8.1-devel-ubuntu22.04 AS chef
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl g++ make && rm -rf /var/lib/apt/lists/*
# The channel of rust-toolchain.toml, without the components that only a developer needs.
ENV RUSTUP_HOME=/opt/rustup CARGO_HOME=/opt/cargo PATH=/opt/cargo/bin:$PATH RUSTUP_TOOLCHAIN=1.95.0
RUN curl -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --default-toolchain "$RUSTUP_TOOLCHAIN"
RUN cargo install --locked cargo-chef@0.1.73
WORKDIR /src

FROM chef AS plan
COPY . .
RUN cargo chef prepare --recipe-path recipe.json

FROM chef AS build
COPY --from=plan /src/recipe.json .
RUN cargo chef cook --release --locked --no-default-features --features cuda,worker --recipe-path recipe.json
COPY . .
ARG BRIGHTRUN_COMMIT=unknown
ENV BRIGHTRUN_KERNELS=require BRIGHTRUN_CUDA_ARCHS=80,86,89,90a,100a,120 BRIGHTRUN_COMMIT=${BRIGHTRUN_COMMIT}
RUN cargo build --release --locked --no-default-features --features cuda,worker --bin brightrun \
    && strip target/release/brightrun
# What goes on top of the base; its size is gated, and scripts/image-root.sh makes the same without a container engine.
RUN scripts/image-files.sh target/release/brightrun /image

FROM debian:12-slim
COPY --from=build /image/ /
# The driver is put in by the host; `compute` brings CUDA, `utility` NVML.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt HOME=/scratch BRIGHTRUN_DEVICE=cuda
USER 10001:10001
WORKDIR /scratch
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/brightrun"]
CMD ["worker"]
