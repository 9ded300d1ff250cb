//! NF4 on the device: launchers.

use super::driver::{Grid, Kernel};
use super::params::{
    NF4_QUANTIZE_ELEMENTS_PER_BLOCK, NF4_QUANTIZE_PARTIALS, NF4_QUANTIZE_THREADS,
    Nf4AbsmaxSumsParams, Nf4QuantizeAbsmaxParams, Nf4QuantizeParams,
};
use super::{Gpu, check, place};
use crate::error::{Error, Result};
use crate::store::nf4::{Absmax, BLOCKSIZE, Nf4Matrix, dynamic};
use crate::tensor::{DType, Tensor};

const QUANTIZE: Kernel = Kernel {
    name: "nf4_quantize",
    threads: NF4_QUANTIZE_THREADS,
};
const ABSMAX_SUMS: Kernel = Kernel {
    name: "nf4_absmax_sums",
    threads: NF4_QUANTIZE_THREADS,
};
const QUANTIZE_ABSMAX: Kernel = Kernel {
    name: "nf4_quantize_absmax",
    threads: NF4_QUANTIZE_THREADS,
};

/// Quantises a bf16 or f32 matrix that lies on the device: what [`Nf4Matrix::from_tensor`] makes of it on the host, bit for
/// bit, in the layout that kernels read. Waits for the device; for loading, not for a step.
///
/// # Errors
/// Those of [`Nf4Matrix::from_tensor`]; those of the device.
pub fn quantize(gpu: &Gpu, weights: &Tensor, double_quant: bool) -> Result<Nf4Matrix> {
    const OP: &str = "nf4 quantize";
    let &[out_features, in_features] = weights.shape() else {
        return Err(Error::Shape {
            op: OP,
            tensor: weights.name().to_owned(),
            found: weights.shape().to_vec(),
            expected: vec![0, 0],
        });
    };
    let (weights_bf16, weights_f32) = match weights.dtype() {
        DType::Bf16 => (weights.device_address()?, 0),
        DType::F32 => (0, weights.device_address()?),
        DType::F16 | DType::U8 | DType::U32 | DType::I32 => {
            return Err(Error::DType {
                op: OP,
                tensor: weights.name().to_owned(),
                found: weights.dtype().name(),
                expected: "bf16 or f32",
            });
        }
    };
    let (driver, name) = (gpu.driver(), weights.name());
    let num_elements = weights.len();
    let num_blocks = num_elements.div_ceil(BLOCKSIZE);
    let codes = [num_elements.div_ceil(2)];
    let codes = place::alloc(&**driver, &format!("{name}.codes"), &codes, DType::U8)?;
    let absmax = format!("{name}.absmax");
    let absmax = place::alloc(&**driver, &absmax, &[num_blocks], DType::F32)?;
    let is_not_finite = driver.alloc("is_not_finite", 4)?;
    gpu.zero(is_not_finite.address(), 4)?;
    let params = Nf4QuantizeParams {
        codes: codes.device_address()?,
        absmax: absmax.device_address()?,
        is_not_finite: is_not_finite.address(),
        weights: weights_bf16,
        weights_f32,
        num_elements: num_elements as u64,
    };
    let blocks = num_elements.div_ceil(NF4_QUANTIZE_ELEMENTS_PER_BLOCK as usize);
    let grid = Grid::line(check::to_u32(OP, "elements", blocks)?);
    gpu.launch(QUANTIZE, grid, &params)?;
    let mut flag = [0; 4];
    is_not_finite.read(0, &mut flag)?;
    if flag != [0; 4] {
        return Err(Error::format(
            name,
            "holds a NaN or infinite weight, expected finite ones; download the checkpoint again",
        ));
    }
    let absmax = if double_quant {
        quantize_absmax(gpu, &absmax)?
    } else {
        Absmax::Plain(absmax)
    };
    Ok(Nf4Matrix {
        out_features,
        in_features,
        codes,
        absmax,
    })
}

/// Double quantisation of `absmax`, f32.
fn quantize_absmax(gpu: &Gpu, absmax: &Tensor) -> Result<Absmax> {
    let (driver, num_blocks) = (gpu.driver(), absmax.len());
    let num_nested = num_blocks.div_ceil(dynamic::BLOCKSIZE);
    let codes = place::alloc(&**driver, absmax.name(), &[num_blocks], DType::U8)?;
    let nested = absmax.name().replace(".absmax", ".nested_absmax");
    let nested_absmax = place::alloc(&**driver, &nested, &[2 * num_nested], DType::F32)?;
    let sums = driver.alloc("absmax sums", NF4_QUANTIZE_PARTIALS as usize * 8)?;
    let params = Nf4AbsmaxSumsParams {
        sums: sums.address(),
        absmax: absmax.device_address()?,
        num_blocks: num_blocks as u64,
    };
    gpu.launch(ABSMAX_SUMS, Grid::line(NF4_QUANTIZE_PARTIALS), &params)?;
    let params = Nf4QuantizeAbsmaxParams {
        codes: codes.device_address()?,
        nested_absmax: nested_absmax.device_address()?,
        absmax: absmax.device_address()?,
        sums: sums.address(),
        dynamic_code: gpu.dynamic_code(),
        num_blocks: num_blocks as u64,
    };
    let grid = Grid::line(check::to_u32("nf4 quantize", "blocks", num_nested)?);
    gpu.launch(QUANTIZE_ABSMAX, grid, &params)?;
    // Each pair holds it. The read also waits for the kernels, so that what they read may go.
    let offset = match num_nested {
        0 => 0.0,
        _ => nested_absmax.leading_f32(2)?[1],
    };
    Ok(Absmax::Nested {
        codes,
        nested_absmax,
        offset,
    })
}
