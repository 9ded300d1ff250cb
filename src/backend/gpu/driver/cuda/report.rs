//! What the CUDA driver's refusals say.

use crate::backend::gpu::driver::{Grid, Kernel};
use crate::error::Error;

/// What kept CUDA from being used at all.
pub(super) fn unsupported(why: impl Into<String>) -> Error {
    Error::Unsupported {
        what: "device `cuda`".to_owned(),
        why: why.into(),
    }
}

pub(super) fn no_driver() -> Error {
    unsupported("no NVIDIA driver was found (libcuda.so.1)")
}

pub(super) fn no_kernels() -> Error {
    unsupported(
        "this build has no CUDA kernels: run scripts/get-nvcc.sh (or set NVCC), then build again",
    )
}

/// Versions are major and minor.
pub(super) fn old_driver(found: (u32, u32), needed: (u32, u32)) -> Error {
    unsupported(format!(
        "the NVIDIA driver is for CUDA {}.{}, this build needs one for CUDA {}.{} or newer: update the driver, or build with an older nvcc",
        found.0, found.1, needed.0, needed.1
    ))
}

pub(super) fn no_device(ordinal: usize, count: usize) -> Error {
    unsupported(match count {
        0 => "the NVIDIA driver shows no device (is CUDA_VISIBLE_DEVICES empty?)".to_owned(),
        1 => format!("there is no `cuda:{ordinal}`, only `cuda:0`"),
        _ => format!(
            "there is no `cuda:{ordinal}`, only `cuda:0` to `cuda:{}`",
            count - 1
        ),
    })
}

pub(super) fn no_binary(device: &str, capability: (u32, u32), archs: &str) -> Error {
    let (major, minor) = capability;
    unsupported(format!(
        "the kernels were compiled for {archs}, {device} has capability {major}.{minor}: build again with BRIGHTRUN_CUDA_ARCHS={major}{minor} (80 or above)"
    ))
}

pub(super) fn out_of_memory(
    name: &str,
    num_bytes: usize,
    free_of_total: Option<(usize, usize)>,
) -> Error {
    let room = free_of_total.map_or_else(String::new, |(free, total)| {
        format!(", {free} of the device's {total} are free")
    });
    Error::OutOfMemory {
        reason: format!(
            "`{name}` of {num_bytes} bytes does not fit into device memory{room}; lower `sequence_len` or `micro_batch_size`, or set `recompute: full`"
        ),
    }
}

/// A launch, for messages.
pub(super) fn launch(kernel: Kernel, grid: Grid) -> String {
    let [x, y, z] = grid.blocks;
    let Kernel { name, threads } = kernel;
    let shared = grid.dynamic_shared_bytes;
    format!(
        "kernel {name}, grid {x} x {y} x {z}, {threads} threads, {shared} bytes of dynamic shared memory"
    )
}

/// A kernel failed some time before `what` was asked for.
pub(super) fn fault(what: &str, error: &str, last: Option<&str>, is_synchronous: bool) -> Error {
    let reason = match last {
        Some(last) if is_synchronous => format!("{last}: {error}"),
        Some(last) => format!(
            "{what}: an earlier launch failed: {error}; the last one was {last}; set BRIGHTRUN_SYNC=1 to locate the launch"
        ),
        None => format!("{what}: {error}"),
    };
    Error::Kernel { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: Kernel = Kernel {
        name: "rms_norm_forward",
        threads: 256,
    };

    #[test]
    fn refusals_say_what_to_do() {
        let cases = [
            (
                no_driver(),
                "device `cuda` is not supported: no NVIDIA driver was found (libcuda.so.1)",
            ),
            (
                no_device(3, 2),
                "device `cuda` is not supported: there is no `cuda:3`, only `cuda:0` to `cuda:1`",
            ),
            (
                old_driver((12, 2), (13, 0)),
                "device `cuda` is not supported: the NVIDIA driver is for CUDA 12.2, this build needs one for CUDA 13.0 or newer: \
                 update the driver, or build with an older nvcc",
            ),
        ];
        for (error, text) in cases {
            assert_eq!(error.to_string(), text);
            assert_eq!(error.exit_code(), 78);
        }
    }

    #[test]
    fn memory_that_does_not_fit_is_named() {
        let error = out_of_memory("layers.0.q_proj", 1000, Some((10, 100)));
        assert_eq!(error.exit_code(), 12);
        assert!(error.to_string().starts_with(
            "`layers.0.q_proj` of 1000 bytes does not fit into device memory, 10 of the device's 100 are free"
        ));
    }

    #[test]
    fn a_fault_tells_the_last_launch_or_the_culprit() {
        let last = launch(KERNEL, Grid::plane(2, 3).with_shared(4));
        let late = fault("synchronize", "CUDA_ERROR_X", Some(&last), false).to_string();
        assert!(
            late.contains("the last one was kernel rms_norm_forward, grid 2 x 3 x 1, 256 threads")
        );
        assert!(late.ends_with("set BRIGHTRUN_SYNC=1 to locate the launch"));
        let found = fault("synchronize", "CUDA_ERROR_X", Some(&last), true).to_string();
        assert!(found.starts_with("kernel rms_norm_forward, grid 2 x 3 x 1"));
    }
}
