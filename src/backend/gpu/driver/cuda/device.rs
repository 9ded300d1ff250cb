//! The driver's handles of a device, and the calls that use them.
#![expect(
    unsafe_code,
    reason = "calls the CUDA driver; every launch is checked against what the kernel declares"
)]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUresult};

use super::staging::Ring;
use super::{Fatbins, report};
use crate::backend::gpu::driver::{DeviceInfo, Grid, Kernel};
use crate::error::{Error, Result};

/// Pinned memory that writes go through.
const RING_BYTES: usize = 64 << 20;
/// A write is cut into pieces of this, so that the host fills one while the device copies another.
const PIECE_BYTES: usize = 8 << 20;
/// Pinned memory behind the ring that reads go through.
const READ_BYTES: usize = 8 << 20;
/// Bytes of a device's name.
const NAME_BYTES: c_int = 255;

/// A loaded kernel and what it takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function {
    handle: sys::CUfunction,
    params_bytes: usize,
    max_threads: u32,
    max_dynamic_shared_bytes: u32,
}

/// Everything of the driver's that is given back at the end.
#[derive(Debug)]
pub(super) struct Device {
    handle: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
    pub(super) info: DeviceInfo,
    staging: Mutex<Staging>,
    pub(super) state: Mutex<State>,
    pub(super) is_synchronous: bool,
}

// SAFETY: the handles are names that the driver takes from any thread whose context is current (`bind`); what this program
// changes lies in mutexes.
unsafe impl Send for Device {}
// SAFETY: as for `Send`.
unsafe impl Sync for Device {}

#[derive(Debug)]
pub(super) struct Staging {
    /// `RING_BYTES`, then `READ_BYTES`.
    pinned: *mut u8,
    ring: Ring<sys::CUevent>,
    spare: Vec<sys::CUevent>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) last: Option<(Kernel, Grid)>,
    pub(super) is_recording: bool,
    /// What a synchronous device is to do again.
    pub(super) recorded: Vec<Work>,
}

/// Something the device is told to do.
#[derive(Debug, Clone)]
pub(super) enum Work {
    Launch {
        kernel: Kernel,
        grid: Grid,
        params: Vec<u8>,
    },
    Zero {
        address: u64,
        num_bytes: usize,
    },
}

impl Device {
    pub(super) fn new(handle: sys::CUdevice, is_synchronous: bool) -> Result<Self, DriverError> {
        let mut name = [0; NAME_BYTES as usize + 1];
        // SAFETY: `name` is live for the call, and has a byte more than is written, which stays zero.
        unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), NAME_BYTES, handle) }.result()?;
        // SAFETY: a zero ends it.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        let attribute = |which| attribute(handle, which);
        let info = DeviceInfo {
            name: name.to_string_lossy().into_owned(),
            num_multiprocessors: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )?,
            capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
        };
        let mut context = null_mut();
        // SAFETY: `context` is live for the call; it is released in `drop`.
        unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, handle) }.result()?;
        let mut device = Self {
            handle,
            context,
            stream: null_mut(),
            modules: Vec::new(),
            functions: HashMap::new(),
            info,
            staging: Mutex::new(Staging {
                pinned: null_mut(),
                ring: Ring::new(RING_BYTES),
                spare: Vec::new(),
            }),
            state: Mutex::default(),
            is_synchronous,
        };
        device.make_current()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` is live for the call; it is destroyed in `drop`.
        unsafe { sys::cuStreamCreate(&raw mut device.stream, flags) }.result()?;
        Ok(device)
    }

    pub(super) fn load(&mut self, fatbins: Fatbins) -> Result<()> {
        let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let limit = attribute(self.handle, most)
            .map_err(|error| self.failed("shared memory of a block", error))?;
        for (file, code, kernels) in fatbins.files {
            let mut module = null_mut();
            // SAFETY: `code` is a whole fatbin made by nvcc, which tells its own length; the driver copies what it needs.
            let status = unsafe { sys::cuModuleLoadData(&raw mut module, code.as_ptr().cast()) };
            match status.result() {
                Ok(()) => self.modules.push(module),
                Err(error) => {
                    return Err(self.not_loaded(&format!("loading {file}"), error, fatbins));
                }
            }
            for kernel in *kernels {
                let function = function(module, kernel, limit).map_err(|error| {
                    self.not_loaded(&format!("loading kernel {kernel}"), error, fatbins)
                })?;
                self.functions.insert(kernel, function);
            }
        }
        Ok(())
    }

    /// What to say of code that the driver did not take; one that loads lazily tells it of a kernel, not of its file.
    fn not_loaded(&self, what: &str, error: DriverError, fatbins: Fatbins) -> Error {
        if error.0 == CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
            return report::no_binary(&self.info.name, self.info.capability, fatbins.archs);
        }
        self.failed(what, error)
    }

    pub(super) fn reserve_staging(&self) -> Result<()> {
        let mut pinned = null_mut();
        // SAFETY: `pinned` is live for the call; it is freed in `drop`.
        unsafe { sys::cuMemHostAlloc(&raw mut pinned, RING_BYTES + READ_BYTES, 0) }
            .result()
            .map_err(|error| self.failed("pinned memory for copies", error))?;
        lock(&self.staging).pinned = pinned.cast();
        Ok(())
    }

    /// Makes the context that of the calling thread, as every other call needs.
    pub(super) fn make_current(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained until `drop`.
        unsafe { sys::cuCtxSetCurrent(self.context) }.result()
    }

    pub(super) fn bind(&self, what: &str) -> Result<()> {
        self.make_current()
            .map_err(|error| self.failed(what, error))
    }

    /// What to say of `error`, which `what` got.
    pub(super) fn failed(&self, what: &str, error: DriverError) -> Error {
        if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Error::OutOfMemory {
                reason: format!("{what}: {}", describe(error)),
            };
        }
        // These are what a kernel does; others are a call's own.
        let is_fault = matches!(
            error.0,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | CUresult::CUDA_ERROR_LAUNCH_FAILED
                | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUresult::CUDA_ERROR_INVALID_PC
                | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUresult::CUDA_ERROR_ASSERT
        );
        let last = lock(&self.state).last.filter(|_| is_fault);
        let last = last.map(|(kernel, grid)| report::launch(kernel, grid));
        report::fault(what, &describe(error), last.as_deref(), self.is_synchronous)
    }

    pub(super) fn wait(&self, what: &str) -> Result<()> {
        // SAFETY: the stream lives until `drop`.
        let status = unsafe { sys::cuStreamSynchronize(self.stream) };
        status.result().map_err(|error| self.failed(what, error))
    }

    /// Refuses what cannot be recorded.
    pub(super) fn check_not_recording(&self, what: &str) -> Result<()> {
        if lock(&self.state).is_recording {
            return Err(kernel_error(format!("{what} inside a recording")));
        }
        Ok(())
    }

    /// Does it, or keeps it where a synchronous device records.
    pub(super) fn submit(&self, work: Work) -> Result<()> {
        let mut state = lock(&self.state);
        if state.is_recording && self.is_synchronous {
            state.recorded.push(work);
            return Ok(());
        }
        drop(state);
        self.run(&work)
    }

    pub(super) fn run(&self, work: &Work) -> Result<()> {
        let what = match work {
            Work::Launch { kernel, grid, .. } => report::launch(*kernel, *grid),
            Work::Zero { num_bytes, .. } => format!("zeroing {num_bytes} bytes"),
        };
        self.bind(&what)?;
        match work {
            Work::Launch {
                kernel,
                grid,
                params,
            } => self.run_kernel(*kernel, *grid, params, &what)?,
            Work::Zero { address, num_bytes } => {
                // SAFETY: that the range lies in live memory of this device is the launcher's duty (see `Driver::zero`).
                unsafe { sys::cuMemsetD8Async(*address, 0, *num_bytes, self.stream) }
                    .result()
                    .map_err(|error| self.failed(&what, error))?;
            }
        }
        if self.is_synchronous {
            self.wait(&what)?;
        }
        Ok(())
    }

    /// The loaded `kernel`, where it can be launched like this.
    pub(super) fn function(&self, kernel: Kernel, grid: Grid) -> Result<&Function> {
        let what = || report::launch(kernel, grid);
        let function = self.functions.get(kernel.name);
        let function =
            function.ok_or_else(|| kernel_error(format!("{}: there is no such kernel", what())))?;
        grid.check(kernel)?;
        let limits = [
            ("threads", kernel.threads, function.max_threads),
            (
                "bytes of dynamic shared memory",
                grid.dynamic_shared_bytes,
                function.max_dynamic_shared_bytes,
            ),
        ];
        for (unit, wanted, limit) in limits {
            if wanted > limit {
                return Err(Error::Unsupported {
                    what: format!("{} with {wanted} {unit}", what()),
                    why: format!("{} has at most {limit} of them for it", self.info.name),
                });
            }
        }
        Ok(function)
    }

    fn run_kernel(&self, kernel: Kernel, grid: Grid, params: &[u8], what: &str) -> Result<()> {
        let function = self.function(kernel, grid)?;
        if params.len() != function.params_bytes {
            return Err(kernel_error(format!(
                "{what}: {} bytes of params, the kernel takes {}",
                params.len(),
                function.params_bytes
            )));
        }
        // Params structs hold addresses: eight bytes is their alignment.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        let mut arguments = [aligned.as_mut_ptr().cast::<c_void>()];
        let [x, y, z] = grid.blocks;
        // SAFETY: the function is loaded until `drop`; it takes one struct, by value, of as many bytes as are given (checked),
        // which the call copies; that the addresses in it are live and large enough is the launcher's duty.
        let status = unsafe {
            sys::cuLaunchKernel(
                function.handle,
                x,
                y,
                z,
                kernel.threads,
                1,
                1,
                grid.dynamic_shared_bytes,
                self.stream,
                arguments.as_mut_ptr(),
                null_mut(),
            )
        };
        // An error here may be an earlier launch's: that one is the last until this one went through.
        status.result().map_err(|error| self.failed(what, error))?;
        lock(&self.state).last = Some((kernel, grid));
        Ok(())
    }

    /// Room for `len` bytes in the ring, waiting for the oldest copies where it is full.
    fn place(&self, staging: &mut Staging, len: usize) -> Result<usize> {
        loop {
            if let Some(start) = staging.ring.place(len) {
                return Ok(start);
            }
            let Some(event) = staging.ring.oldest().copied() else {
                return Err(kernel_error(format!("a piece of {len} bytes is too long")));
            };
            // SAFETY: the event lives until `drop`.
            let status = unsafe { sys::cuEventSynchronize(event) };
            status
                .result()
                .map_err(|error| self.failed("waiting for a copy", error))?;
            staging.spare.extend(staging.ring.retire());
        }
    }

    /// Copies at most `PIECE_BYTES` to `address`.
    fn write_piece(&self, staging: &mut Staging, address: u64, piece: &[u8]) -> Result<(), Error> {
        let failed = |error| self.failed("copy to the device", error);
        let start = self.place(staging, piece.len())?;
        let pinned = staging.pinned.wrapping_add(start);
        // SAFETY: the ring gave these bytes of the pinned memory, which no copy in flight reads.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), pinned, piece.len()) };
        // SAFETY: the pinned bytes stay as they are until the event recorded below; the caller checked the device's range.
        unsafe { sys::cuMemcpyHtoDAsync_v2(address, pinned.cast(), piece.len(), self.stream) }
            .result()
            .map_err(failed)?;
        let event = match staging.spare.pop() {
            Some(event) => event,
            None => new_event().map_err(failed)?,
        };
        // SAFETY: the event and the stream live until `drop`.
        let recorded = unsafe { sys::cuEventRecord(event, self.stream) }.result();
        staging.ring.push(start, piece.len(), event);
        recorded.map_err(|error| {
            // Without the event only this tells when the pinned bytes are free.
            let _ = self.wait("copy to the device");
            failed(error)
        })
    }

    fn read_piece(&self, staging: &Staging, address: u64, piece: &mut [u8]) -> Result<()> {
        let pinned = staging.pinned.wrapping_add(RING_BYTES);
        // SAFETY: `piece` is at most `READ_BYTES`, which lie here and which only reads use, one at a time (the lock).
        unsafe { sys::cuMemcpyDtoHAsync_v2(pinned.cast(), address, piece.len(), self.stream) }
            .result()
            .map_err(|error| self.failed("copy from the device", error))?;
        self.wait("copy from the device")?;
        // SAFETY: the copy into the pinned bytes is done.
        unsafe { std::ptr::copy_nonoverlapping(pinned, piece.as_mut_ptr(), piece.len()) };
        Ok(())
    }

    /// Copies `bytes` to `address` on, where there is room for them.
    pub(super) fn write(&self, mut address: u64, bytes: &[u8]) -> Result<()> {
        let mut staging = lock(&self.staging);
        for piece in bytes.chunks(PIECE_BYTES) {
            self.write_piece(&mut staging, address, piece)?;
            address += piece.len() as u64;
        }
        Ok(())
    }

    /// Copies what lies from `address` on to `out`.
    pub(super) fn read(&self, mut address: u64, out: &mut [u8]) -> Result<()> {
        let staging = lock(&self.staging);
        for piece in out.chunks_mut(READ_BYTES) {
            self.read_piece(&staging, address, piece)?;
            address += piece.len() as u64;
        }
        Ok(())
    }
}

impl Drop for Device {
    /// Gives back what was made; errors, which a failed device gives to every call, are of no use any more.
    fn drop(&mut self) {
        if self.make_current().is_err() {
            return;
        }
        if !self.stream.is_null() {
            // SAFETY: the stream was created in `new` and is destroyed below.
            let _ = unsafe { sys::cuStreamSynchronize(self.stream) };
        }
        let mut staging = lock(&self.staging);
        while let Some(event) = staging.ring.retire() {
            staging.spare.push(event);
        }
        for event in staging.spare.drain(..) {
            // SAFETY: created in `new_event`, destroyed once.
            let _ = unsafe { sys::cuEventDestroy_v2(event) };
        }
        if !staging.pinned.is_null() {
            // SAFETY: allocated in `reserve_staging`, freed once; the stream has no copy left.
            let _ = unsafe { sys::cuMemFreeHost(staging.pinned.cast()) };
        }
        drop(staging);
        for module in &self.modules {
            // SAFETY: loaded in `load`, unloaded once; no launch is left in the stream.
            let _ = unsafe { sys::cuModuleUnload(*module) };
        }
        if !self.stream.is_null() {
            // SAFETY: created in `new`, destroyed once.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
        // SAFETY: retained in `new`, released once.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

fn attribute(device: sys::CUdevice, which: CUdevice_attribute) -> Result<u32, DriverError> {
    let mut value: c_int = 0;
    // SAFETY: `value` is live for the call, `device` is one that `cuDeviceGet` gave.
    unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) }.result()?;
    Ok(value.unsigned_abs())
}

/// Looks up a kernel, and lets it have all the shared memory a block can have.
fn function(module: sys::CUmodule, name: &str, limit: u32) -> Result<Function, DriverError> {
    let name = CString::new(name).unwrap_or_default();
    let mut handle = null_mut();
    // SAFETY: the module is loaded, the name ends in a zero.
    unsafe { sys::cuModuleGetFunction(&raw mut handle, module, name.as_ptr()) }.result()?;
    let (mut offset, mut params_bytes) = (0, 0);
    // SAFETY: the function is loaded; both results are live for the call.
    unsafe { sys::cuFuncGetParamInfo(handle, 0, &raw mut offset, &raw mut params_bytes) }
        .result()?;
    let of = |which| {
        let mut value: c_int = 0;
        // SAFETY: the function is loaded, `value` is live for the call.
        unsafe { sys::cuFuncGetAttribute(&raw mut value, which, handle) }.result()?;
        Ok(value.unsigned_abs())
    };
    let own = of(CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
    let most = limit.saturating_sub(own);
    let which = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let value = c_int::try_from(most).unwrap_or(c_int::MAX);
    // SAFETY: the function is loaded.
    unsafe { sys::cuFuncSetAttribute(handle, which, value) }.result()?;
    Ok(Function {
        handle,
        params_bytes,
        max_threads: of(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        max_dynamic_shared_bytes: most,
    })
}

fn new_event() -> Result<sys::CUevent, DriverError> {
    let mut event = null_mut();
    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: `event` is live for the call; it is destroyed with the device.
    unsafe { sys::cuEventCreate(&raw mut event, flags) }.result()?;
    Ok(event)
}

/// Free and total bytes of the current context's device.
pub(super) fn memory_info() -> Result<(usize, usize), DriverError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are live for the call.
    unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }.result()?;
    Ok((free, total))
}

/// The driver's name and text of an error.
pub(super) fn describe(error: DriverError) -> String {
    let text = |found: Result<&CStr, DriverError>| {
        found.map_or_else(
            |_| "?".to_owned(),
            |text| text.to_string_lossy().into_owned(),
        )
    };
    format!(
        "{} ({})",
        text(error.error_name()),
        text(error.error_string())
    )
}

pub(super) fn kernel_error(reason: String) -> Error {
    Error::Kernel { reason }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
