//! GPUs that people rent, and what they can do.

use crate::backend::gpu::driver::DeviceInfo;
use crate::error::{Error, Result};
use crate::ops::cost::Cost;
use crate::train::memory::{CONTEXT_BYTES, Target};

/// Share of an op's limit that kernels are taken to reach: about what `docs/kernels.md` expects of the hot ones (22 to 66 %).
/// An assumption until it is measured.
const SHARE_OF_LIMIT: f64 = 0.5;

/// A kind of GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuKind {
    /// Its name.
    pub name: &'static str,
    /// Memory that a process can have, in bytes.
    pub num_bytes: u64,
    /// Bytes of memory in a second that a copy reaches.
    pub bandwidth: f64,
    /// bf16 FLOPs in a second that a large product reaches.
    pub flops: f64,
    num_multiprocessors: u32,
    capability: (u32, u32),
}

const MIB: u64 = 1 << 20;

/// Memory: what `nvidia-smi` shows in all. Bandwidth and FLOPs: H200 as published measurements have them (4.3 TB/s,
/// 790 TFLOP/s); the others are assumptions, 90 % of the data sheet's bandwidth and 70 to 87 % of its dense bf16 rate.
pub const GPUS: [GpuKind; 8] = [
    gpu("H200", 143_771, 4.3e12, 790e12, 132, (9, 0)),
    gpu("H100-80GB", 81_559, 3.0e12, 700e12, 132, (9, 0)),
    gpu("A100-80GB", 81_920, 1.8e12, 270e12, 108, (8, 0)),
    gpu("A100-40GB", 40_960, 1.4e12, 270e12, 108, (8, 0)),
    gpu("RTX-PRO-6000", 97_887, 1.6e12, 350e12, 188, (12, 0)),
    gpu("L40S", 46_068, 0.78e12, 260e12, 142, (8, 9)),
    gpu("RTX-5090", 32_607, 1.6e12, 170e12, 170, (12, 0)),
    gpu("RTX-4090", 24_564, 0.9e12, 140e12, 128, (8, 9)),
];

const fn gpu(
    name: &'static str,
    mib: u64,
    bandwidth: f64,
    flops: f64,
    num_multiprocessors: u32,
    capability: (u32, u32),
) -> GpuKind {
    GpuKind {
        name,
        num_bytes: mib * MIB,
        bandwidth,
        flops,
        num_multiprocessors,
        capability,
    }
}

impl GpuKind {
    /// Seconds that an op of `cost` is predicted to take.
    pub(super) fn seconds(self, cost: Cost) -> f64 {
        let limit = (cost.flops as f64 / self.flops).max(cost.bytes as f64 / self.bandwidth);
        limit / SHARE_OF_LIMIT
    }

    /// A device that is there, of which `free` bytes are free beside the driver's own; its speed is taken for that of the slowest
    /// kind of its generation.
    pub fn of(info: &DeviceInfo, free: u64) -> Self {
        let is_like = |gpu: &&Self| gpu.capability.0 == info.capability.0;
        let like = GPUS
            .iter()
            .filter(is_like)
            .min_by(|a, b| a.flops.total_cmp(&b.flops));
        Self {
            name: "GPU of this machine",
            num_bytes: free + CONTEXT_BYTES,
            num_multiprocessors: info.num_multiprocessors,
            capability: info.capability,
            ..*like.unwrap_or(&GPUS[0])
        }
    }

    /// The same with as much shared memory for a block as any GPU has.
    pub(super) fn with_all_shared_memory(self) -> Self {
        let capability = (9, 0);
        Self { capability, ..self }
    }

    /// What to plan for.
    pub fn target(self) -> Target {
        Target {
            info: DeviceInfo {
                name: self.name.to_owned(),
                num_multiprocessors: self.num_multiprocessors,
                capability: self.capability,
            },
            num_bytes: self.num_bytes,
        }
    }
}

/// A GPU by name or a part of it that only one has, or one of so many GB, such as `80GB`: that many GiB less the 1 % that its
/// driver keeps, otherwise like the GPU of the table whose memory is nearest; of several the slowest.
///
/// # Errors
/// [`Error::Config`] saying what is known.
pub fn parse(text: &str) -> Result<GpuKind> {
    let wanted = text.to_uppercase().replace([' ', '_'], "-");
    let refuse = |reason: String| {
        let origin = "--gpu".to_owned();
        Err(Error::Config { origin, reason })
    };
    let is_part = |gpu: &&GpuKind| format!("-{}-", gpu.name).contains(&format!("-{wanted}-"));
    let is_named = |gpu: &&GpuKind| gpu.name == wanted;
    let size = wanted.strip_suffix("GB").unwrap_or(&wanted).parse::<u64>();
    let names = |gpus: &[&GpuKind]| -> String {
        let names: Vec<&str> = gpus.iter().map(|gpu| gpu.name).collect();
        names.join(", ")
    };
    let parts: Vec<&GpuKind> = GPUS.iter().filter(is_part).collect();
    match (GPUS.iter().find(is_named), size, parts.as_slice()) {
        (Some(gpu), _, _) => Ok(*gpu),
        (None, Ok(size @ 1..=1024), _) => Ok(of_size(size)),
        (None, _, [gpu]) => Ok(**gpu),
        (None, _, []) => refuse(format!(
            "`{text}` is no GPU that is known; give a size such as `80GB`, or one of {}",
            names(&GPUS.iter().collect::<Vec<_>>())
        )),
        (None, _, several) => refuse(format!(
            "`{text}` may be {}; say which, or give a size such as `80GB`",
            names(several)
        )),
    }
}

fn of_size(gb: u64) -> GpuKind {
    let num_bytes = gb * 1024 * MIB / 100 * 99;
    let distance = |gpu: &GpuKind| gpu.num_bytes.abs_diff(gb * 1024 * MIB) / (2048 * MIB);
    let mut like = GPUS[0];
    for gpu in GPUS {
        let (own, best) = (distance(&gpu), distance(&like));
        if own < best || (own == best && gpu.flops < like.flops) {
            like = gpu;
        }
    }
    let name = "GPU";
    GpuKind {
        name,
        num_bytes,
        ..like
    }
}
