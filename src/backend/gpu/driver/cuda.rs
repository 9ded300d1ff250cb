//! CUDA, through the driver API, which is loaded when a device is opened: the build links nothing.
//!
//! One context, one stream: everything happens in the order it was asked for. Weights are placed one by one, each an
//! allocation that lives as long as it; all buffers of a run lie in one (`Driver::reserve`), the scratch in another. Writes
//! go through a ring of pinned memory (`staging.rs`) and return once the bytes lie there; they wait for the device only
//! where the ring is full. Reads wait. All kernels are loaded, and what they take is looked up, when the device is
//! opened: later nothing is loaded lazily, also not while a graph is recorded.
#![expect(
    unsafe_code,
    reason = "calls the CUDA driver; every launch is checked against what the kernel declares"
)]

mod device;
mod report;
mod staging;

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex};

use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUresult};

use self::device::{Device, Work, describe, kernel_error, lock, memory_info};
use super::{ALIGNMENT, DeviceInfo, Driver, Grid, Kernel, Recording};
use crate::error::Result;
use crate::tensor::device::DeviceMemory;

/// What `cuFuncGetParamInfo` needs.
const MIN_DRIVER: (u32, u32) = (12, 4);

/// Compiled kernels, as `build.rs` embeds them.
#[derive(Debug, Clone, Copy)]
pub struct Fatbins {
    /// What they were compiled for, such as `80,90a`.
    pub archs: &'static str,
    /// CUDA version of the compiler, major and minor.
    pub toolkit: (u32, u32),
    /// Name, code and kernels of every file.
    pub files: &'static [(&'static str, &'static [u8], &'static [&'static str])],
}

#[cfg(kernels_cuda)]
include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Code at an address that the driver reads its header from in whole words.
#[cfg(kernels_cuda)]
#[repr(align(64))]
struct Aligned<const N: usize>([u8; N]);

/// A build without nvcc has no kernels.
#[cfg(not(kernels_cuda))]
const FATBINS: Fatbins = Fatbins {
    archs: "",
    toolkit: (0, 0),
    files: &[],
};

/// A CUDA device.
#[derive(Debug, Clone)]
pub struct Cuda {
    device: Arc<Device>,
    /// What `reserve` allocated and no one has yet.
    reserved: Arc<Mutex<Option<Reserved>>>,
}

/// The rest of an allocation that the next ones come from.
#[derive(Debug)]
struct Reserved {
    block: Arc<Block>,
    start: usize,
    num_bytes: usize,
}

impl Cuda {
    /// Opens the device `ordinal` with this build's kernels. With `is_synchronous` every launch is waited for, and recordings
    /// launch anew, so that a fault names its kernel.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::error::Error::Unsupported) if there is no driver, no such device or no kernels for it.
    pub fn open(ordinal: usize, is_synchronous: bool) -> Result<Self> {
        Self::open_with(ordinal, is_synchronous, FATBINS)
    }

    /// As [`Self::open`], with other kernels.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(ordinal: usize, is_synchronous: bool, fatbins: Fatbins) -> Result<Self> {
        // SAFETY: it only tries to load the library, whose initialisers are those of the driver.
        if !unsafe { sys::is_culib_present() } {
            return Err(report::no_driver());
        }
        if fatbins.files.is_empty() {
            return Err(report::no_kernels());
        }
        check_version(fatbins.toolkit)?;
        let refuse = |error| report::unsupported(describe(error));
        // SAFETY: `cuInit` may be called any number of times.
        unsafe { sys::cuInit(0) }.result().map_err(refuse)?;
        let mut count: c_int = 0;
        // SAFETY: `count` is live for the call.
        let status = unsafe { sys::cuDeviceGetCount(&raw mut count) };
        status.result().map_err(refuse)?;
        let count = usize::try_from(count).unwrap_or(0);
        let index = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        if ordinal >= count {
            return Err(report::no_device(ordinal, count));
        }
        let mut handle = 0;
        // SAFETY: `handle` is live for the call.
        let status = unsafe { sys::cuDeviceGet(&raw mut handle, index) };
        status.result().map_err(refuse)?;
        let mut device = Device::new(handle, is_synchronous).map_err(refuse)?;
        device.load(fatbins)?;
        device.reserve_staging()?;
        Ok(Self {
            device: Arc::new(device),
            reserved: Arc::default(),
        })
    }

    fn block(&self, name: &str, num_bytes: usize) -> Result<Arc<Block>> {
        let device = &self.device;
        device.check_not_recording(&format!("`{name}` allocated"))?;
        device.bind(name)?;
        let mut address = 0;
        // SAFETY: `address` is live for the call; the memory, which may not be empty, is freed by the owner made below.
        let status = unsafe { sys::cuMemAlloc_v2(&raw mut address, num_bytes.max(1)) };
        match status.result() {
            Ok(()) => Ok(Arc::new(Block {
                address,
                device: Arc::clone(device),
            })),
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(report::out_of_memory(name, num_bytes, memory_info().ok()))
            }
            Err(error) => Err(device.failed(&format!("allocating `{name}`"), error)),
        }
    }

    /// `num_bytes` of what was reserved, where there are as many left.
    fn take_reserved(&self, num_bytes: usize) -> Option<CudaMemory> {
        let mut reserved = lock(&self.reserved);
        let rest = reserved.as_mut()?;
        let taken = num_bytes.next_multiple_of(ALIGNMENT);
        if taken > rest.num_bytes - rest.start {
            return None;
        }
        let memory = CudaMemory {
            address: rest.block.address + rest.start as u64,
            num_bytes,
            block: Arc::clone(&rest.block),
        };
        rest.start += taken;
        if rest.start == rest.num_bytes {
            *reserved = None;
        }
        Some(memory)
    }
}

/// The newest CUDA that the driver runs, against what this build needs. Code of one major version runs on all its drivers.
fn check_version(toolkit: (u32, u32)) -> Result<()> {
    let mut version: c_int = 0;
    // SAFETY: `version` is live for the call, which needs no `cuInit`.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    let refuse = |error| report::unsupported(describe(error));
    status.result().map_err(refuse)?;
    let version = version.unsigned_abs();
    let found = (version / 1000, version % 1000 / 10);
    let needed = MIN_DRIVER.max((toolkit.0, 0));
    if found < needed {
        return Err(report::old_driver(found, needed));
    }
    Ok(())
}

impl Driver for Cuda {
    fn info(&self) -> DeviceInfo {
        self.device.info.clone()
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        let device = &self.device;
        device.bind("free memory")?;
        let (free, _) = memory_info().map_err(|error| device.failed("free memory", error))?;
        Ok(Some(free as u64))
    }

    fn alloc(&self, name: &str, num_bytes: usize) -> Result<Arc<dyn DeviceMemory>> {
        if let Some(memory) = self.take_reserved(num_bytes) {
            return Ok(Arc::new(memory));
        }
        let block = self.block(name, num_bytes)?;
        Ok(Arc::new(CudaMemory {
            address: block.address,
            num_bytes,
            block,
        }))
    }

    fn reserve(&self, name: &str, num_bytes: usize) -> Result<()> {
        lock(&self.reserved).take();
        if num_bytes > 0 {
            let block = self.block(name, num_bytes)?;
            *lock(&self.reserved) = Some(Reserved {
                block,
                start: 0,
                num_bytes,
            });
        }
        Ok(())
    }

    fn check(&self, kernel: Kernel, grid: Grid) -> Result<()> {
        self.device.function(kernel, grid).map(|_| ())
    }

    fn launch(&self, kernel: Kernel, grid: Grid, params: &[u8]) -> Result<()> {
        self.device.submit(Work::Launch {
            kernel,
            grid,
            params: params.to_vec(),
        })
    }

    fn zero(&self, address: u64, num_bytes: usize) -> Result<()> {
        self.device.submit(Work::Zero { address, num_bytes })
    }

    fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>> {
        let device = &self.device;
        device.check_not_recording("a recording")?;
        device.bind("recording")?;
        if device.is_synchronous {
            let recording = Recorder::begin(device);
            body()?;
            let device = Arc::clone(device);
            let work = recording.end();
            return Ok(Box::new(Relaunch { device, work }));
        }
        // Relaxed: other threads may allocate meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives until `drop`; the capture is ended by its owner.
        unsafe { sys::cuStreamBeginCapture_v2(device.stream, mode) }
            .result()
            .map_err(|error| device.failed("recording", error))?;
        let capture = Capture(Some(device));
        let recording = Recorder::begin(device);
        body()?;
        recording.end();
        let graph = capture
            .end()
            .map_err(|error| device.failed("recording", error))?;
        let mut handle = null_mut();
        // SAFETY: the graph is whole; `handle` is live for the call and is destroyed by its owner.
        unsafe { sys::cuGraphInstantiateWithFlags(&raw mut handle, graph.0, 0) }
            .result()
            .map_err(|error| device.failed("recording", error))?;
        Ok(Box::new(CudaRecording {
            handle,
            last: lock(&device.state).last,
            device: Arc::clone(device),
        }))
    }

    fn synchronize(&self) -> Result<()> {
        self.device.check_not_recording("a wait")?;
        self.device.bind("synchronize")?;
        self.device.wait("synchronize")
    }
}

/// While it lives the device records.
struct Recorder<'a>(&'a Device);

impl<'a> Recorder<'a> {
    fn begin(device: &'a Device) -> Self {
        lock(&device.state).is_recording = true;
        Self(device)
    }

    /// What a synchronous device recorded.
    fn end(self) -> Vec<Work> {
        std::mem::take(&mut lock(&self.0.state).recorded)
    }
}

impl Drop for Recorder<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.is_recording = false;
        state.recorded.clear();
    }
}

/// A capture of the stream, which is ended also where what was to be captured fails.
struct Capture<'a>(Option<&'a Device>);

impl Capture<'_> {
    /// Ends it, once.
    fn end(mut self) -> Result<Graph, DriverError> {
        self.take()
    }

    fn take(&mut self) -> Result<Graph, DriverError> {
        let mut graph = null_mut();
        let Some(device) = self.0.take() else {
            return Ok(Graph(graph));
        };
        // SAFETY: `graph` is live for the call; it is destroyed by its owner.
        let ended = unsafe { sys::cuStreamEndCapture(device.stream, &raw mut graph) }.result();
        let graph = Graph(graph);
        ended.map(|()| graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        // What was captured is of no use; that it failed is told already.
        let _ = self.take();
    }
}

/// A captured graph, needed until it is instantiated.
struct Graph(sys::CUgraph);

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by the capture, destroyed once.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// An instantiated graph.
#[derive(Debug)]
struct CudaRecording {
    handle: sys::CUgraphExec,
    last: Option<(Kernel, Grid)>,
    device: Arc<Device>,
}

// SAFETY: as for `Device`.
unsafe impl Send for CudaRecording {}
// SAFETY: as for `Device`; launches of a graph come after each other, as all are in one stream.
unsafe impl Sync for CudaRecording {}

impl Recording for CudaRecording {
    fn replay(&self) -> Result<()> {
        self.device.check_not_recording("a replay")?;
        self.device.bind("replay")?;
        // SAFETY: the graph lives until `drop`; that the memory it was recorded with is live is the caller's duty.
        let status = unsafe { sys::cuGraphLaunch(self.handle, self.device.stream) };
        status
            .result()
            .map_err(|error| self.device.failed("replay", error))?;
        lock(&self.device.state).last = self.last;
        Ok(())
    }
}

impl Drop for CudaRecording {
    fn drop(&mut self) {
        if self.device.make_current().is_ok() {
            // SAFETY: made in `record`, destroyed once; a launch of it that still runs is completed by the driver.
            let _ = unsafe { sys::cuGraphExecDestroy(self.handle) };
        }
    }
}

/// What a synchronous device recorded.
#[derive(Debug)]
struct Relaunch {
    device: Arc<Device>,
    work: Vec<Work>,
}

impl Recording for Relaunch {
    fn replay(&self) -> Result<()> {
        self.work.iter().try_for_each(|work| self.device.run(work))
    }
}

/// An allocation.
#[derive(Debug)]
struct Block {
    address: u64,
    device: Arc<Device>,
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.device.make_current().is_ok() {
            // SAFETY: allocated in `block`, freed once; the driver waits for the work that may use it.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Memory of a CUDA device.
#[derive(Debug)]
struct CudaMemory {
    address: u64,
    num_bytes: usize,
    block: Arc<Block>,
}

impl CudaMemory {
    /// The device, where `num_bytes` from `offset` on may be copied.
    fn checked(&self, offset: usize, num_bytes: usize) -> Result<&Device> {
        let device = &*self.block.device;
        device.check_not_recording("a copy")?;
        let end = offset.checked_add(num_bytes);
        if end.is_some_and(|end| end <= self.num_bytes) {
            device.bind("copy")?;
            return Ok(device);
        }
        Err(kernel_error(format!(
            "copy of {num_bytes} bytes at {offset}, the memory has {}",
            self.num_bytes
        )))
    }
}

impl DeviceMemory for CudaMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        let device = self.checked(offset, out.len())?;
        device.read(self.address + offset as u64, out)
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let device = self.checked(offset, bytes.len())?;
        device.write(self.address + offset as u64, bytes)
    }

    fn zero(&self, offset: usize, num_bytes: usize) -> Result<()> {
        let device = self.checked(offset, num_bytes)?;
        let address = self.address + offset as u64;
        device.submit(Work::Zero { address, num_bytes })
    }
}
