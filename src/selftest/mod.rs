//! The one list of op cases: every op at odd shapes against a reference in f64, on any device.
//!
//! A case builds its inputs on the device under test, calls the op and hands back what it left. The result may be at most
//! twice as far from the reference as a naive implementation in bf16 is (the principle of `FlashAttention`'s tests),
//! or, where rounding the exact result once is more than that, twice as far as that. Integers are equal.
//! Start at [`cases`] and [`Case::check`].

#![expect(
    clippy::cast_possible_truncation,
    reason = "what a reference computes in f64 is another case's input in f32"
)]

mod adamw;
mod attention;
mod cross_entropy;
mod delta_inputs;
mod elementwise;
mod gated_delta;
mod gated_norm;
mod linear;
mod moe;
mod nf4;
mod norm;
mod rope;
mod route;
mod stage;
mod subject;

pub use stage::Stage;
pub use subject::{Subject, cases_of, op_names};

use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use crate::ops::Ops;
use crate::tensor::DType;

/// Relative error of rounding to bf16 once.
const BF16_ROUNDING: f64 = 1.0 / 256.0;
/// Relative error that sums in f32 are allowed: their order differs from device to device.
const F32_ROUNDING: f64 = 4e-6;
/// Limit for the CPU, whose arithmetic is f32 throughout: NMSE 1e-10.
const CPU_ERROR: f64 = 1e-5;

/// A result of a case.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Name.
    pub name: &'static str,
    /// What it holds.
    pub values: Values,
}

/// Values of a result.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Stored as bf16 on devices that compute in it.
    Activation(Vec<f64>),
    /// Stored as f32 on every device.
    F32(Vec<f64>),
    /// Must be equal.
    Exact(Vec<u32>),
}

/// The results of a case, in a fixed order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outputs(Vec<Output>);

impl Outputs {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an activation.
    #[must_use]
    pub fn activation(self, name: &'static str, values: Vec<f64>) -> Self {
        self.with(name, Values::Activation(values))
    }

    /// Adds values that are f32 on every device.
    #[must_use]
    pub fn f32(self, name: &'static str, values: Vec<f64>) -> Self {
        self.with(name, Values::F32(values))
    }

    /// Adds integers.
    #[must_use]
    pub fn exact(self, name: &'static str, values: Vec<u32>) -> Self {
        self.with(name, Values::Exact(values))
    }

    fn with(mut self, name: &'static str, values: Values) -> Self {
        self.0.push(Output { name, values });
        self
    }
}

type RunCase = dyn Fn(&Stage<'_>) -> Result<Outputs>;
type Oracle = dyn Fn() -> Outputs;

/// One call of an op.
pub struct Case {
    /// The op, as `Ops` calls it.
    pub op: &'static str,
    /// Shapes and variants.
    pub label: String,
    run: Box<RunCase>,
    oracle: Box<Oracle>,
    naive: Option<Box<Oracle>>,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.name())
    }
}

/// How far a device's results are from the reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// One entry per result.
    pub errors: Vec<OutputError>,
    /// Runs after the first that gave the same bits.
    pub num_equal_reruns: usize,
    /// Tensors between guard bands that were laid and found intact; 0 where the device does so itself.
    pub num_guarded: usize,
}

/// Errors of one result, relative to the reference, and the limits they must keep.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputError {
    /// Name of the result.
    pub name: &'static str,
    /// L2 norm of the difference over that of the reference.
    pub l2: f64,
    /// Limit of `l2`.
    pub l2_limit: f64,
    /// Largest difference over the largest magnitude of the reference.
    pub max: f64,
    /// Limit of `max`.
    pub max_limit: f64,
}

impl Case {
    /// A case that `run` computes on a device and `oracle` in f64.
    pub fn new(
        op: &'static str,
        label: impl Into<String>,
        run: impl Fn(&Stage<'_>) -> Result<Outputs> + 'static,
        oracle: impl Fn() -> Outputs + 'static,
    ) -> Self {
        Self {
            op,
            label: label.into(),
            run: Box::new(run),
            oracle: Box::new(oracle),
            naive: None,
        }
    }

    /// Where the CPU with rounded activations is more exact than a plain bf16 implementation (it keeps what is inside an op
    /// in f32): one that rounds every intermediate.
    #[must_use]
    pub fn naive(mut self, naive: impl Fn() -> Outputs + 'static) -> Self {
        self.naive = Some(Box::new(naive));
        self
    }

    /// `op[label]`.
    pub fn name(&self) -> String {
        format!("{}[{}]", self.op, self.label)
    }

    /// What the case leaves on a device.
    ///
    /// # Errors
    /// Those of the op.
    pub fn run(&self, ops: &dyn Ops) -> Result<Outputs> {
        (self.run)(&Stage::new(ops))
    }

    /// Runs the case on a device as often as the subject says, holds the first result against the reference and the others
    /// against the first, and looks at the guard bands.
    ///
    /// # Errors
    /// Those of the op; [`Error::Kernel`] naming the result that is too far off, not finite, not equal or not the same again.
    pub fn check(&self, subject: &Subject) -> Result<Report> {
        let mut first: Option<(Outputs, Report)> = None;
        for (label, ops) in subject.runs() {
            let stage = subject.stage(ops);
            let found = (self.run)(&stage).and_then(|found| Ok((found, stage.check_guards()?)));
            let (found, num_guarded) = found.map_err(|error| {
                if let Error::Kernel { reason } = error {
                    return self.failure(&format!("{label}: {reason}"));
                }
                error
            })?;
            match &mut first {
                None => {
                    let in_bf16 = ops.activation_dtype() == DType::Bf16;
                    let mut report = self.compare(&found, in_bf16)?;
                    report.num_guarded = num_guarded;
                    first = Some((found, report));
                }
                Some((first, report)) if *first == found => report.num_equal_reruns += 1,
                Some(_) => return Err(self.failure(&format!("{label} gave other bits"))),
            }
        }
        let report = first.map(|(_, report)| report);
        report.ok_or_else(|| self.failure("no device ran it"))
    }

    /// Holds `found` against the reference.
    ///
    /// # Errors
    /// As [`Self::check`].
    fn compare(&self, found: &Outputs, in_bf16: bool) -> Result<Report> {
        let expected = (self.oracle)();
        let naive = match (&self.naive, in_bf16) {
            (_, false) => None,
            (Some(naive), true) => Some(naive()),
            (None, true) => Some(self.run(&Cpu::with_bf16_rounding())?),
        };
        if found.0.len() != expected.0.len() {
            return Err(self.failure(&format!(
                "{} results, expected {}",
                found.0.len(),
                expected.0.len()
            )));
        }
        let mut errors = Vec::new();
        for (index, (found, expected)) in found.0.iter().zip(&expected.0).enumerate() {
            let naive = naive.as_ref().and_then(|naive| naive.0.get(index));
            errors.extend(self.compare_output(found, expected, naive)?);
        }
        Ok(Report {
            errors,
            num_equal_reruns: 0,
            num_guarded: 0,
        })
    }

    fn compare_output(
        &self,
        found: &Output,
        expected: &Output,
        naive: Option<&Output>,
    ) -> Result<Option<OutputError>> {
        let name = expected.name;
        let (values, reference, rounding) = match (&found.values, &expected.values) {
            (Values::Exact(found), Values::Exact(expected)) => {
                return self.compare_exact(name, found, expected).map(|()| None);
            }
            (Values::Activation(found), Values::Activation(expected)) => {
                (found, expected, BF16_ROUNDING)
            }
            (Values::F32(found), Values::F32(expected)) => (found, expected, F32_ROUNDING),
            _ => return Err(self.failure(&format!("{name} is of another kind than its reference"))),
        };
        if values.len() != reference.len() {
            let lengths = format!("{}, expected {}", values.len(), reference.len());
            return Err(self.failure(&format!("{name} has length {lengths}")));
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(self.failure(&format!("{name}[{at}] is {}", values[at])));
        }
        let (l2, max) = distance(values, reference);
        let (l2_limit, max_limit) = match naive.map(|naive| &naive.values) {
            None => (CPU_ERROR, 10.0 * CPU_ERROR),
            Some(Values::Activation(naive) | Values::F32(naive)) => {
                let (naive_l2, naive_max) = distance(naive, reference);
                (2.0 * naive_l2.max(rounding), 2.0 * naive_max.max(rounding))
            }
            Some(Values::Exact(_)) => {
                return Err(self.failure(&format!("naive {name} holds integers")));
            }
        };
        let error = OutputError {
            name,
            l2,
            l2_limit,
            max,
            max_limit,
        };
        // Written so that NaN fails.
        if l2 <= l2_limit && max <= max_limit {
            return Ok(Some(error));
        }
        Err(self.failure(&format!(
            "{name} is off: relative L2 {l2:.2e} (limit {l2_limit:.2e}), max {max:.2e} (limit {max_limit:.2e})"
        )))
    }

    fn compare_exact(&self, name: &str, found: &[u32], expected: &[u32]) -> Result<()> {
        let at = found.iter().zip(expected).position(|(f, e)| f != e);
        match at {
            Some(at) => Err(self.failure(&format!(
                "{name}[{at}] is {}, expected {}",
                found[at], expected[at]
            ))),
            None if found.len() != expected.len() => Err(self.failure(&format!(
                "{name} has length {}, expected {}",
                found.len(),
                expected.len()
            ))),
            None => Ok(()),
        }
    }

    fn failure(&self, what: &str) -> Error {
        Error::Kernel {
            reason: format!("{}: {what}", self.name()),
        }
    }
}

/// Relative distance in the L2 and in the maximum norm; absolute where the reference is zero.
fn distance(found: &[f64], expected: &[f64]) -> (f64, f64) {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let largest =
        |values: &mut dyn Iterator<Item = f64>| values.fold(0.0_f64, |max, v| max.max(v.abs()));
    let differences = || found.iter().zip(expected).map(|(f, e)| f - e);
    let relative = |error: f64, size: f64| if size > 0.0 { error / size } else { error };
    let l2 = relative(
        norm(&mut differences()),
        norm(&mut expected.iter().copied()),
    );
    let max = relative(
        largest(&mut differences()),
        largest(&mut expected.iter().copied()),
    );
    (l2, max)
}

/// Every case.
pub fn cases() -> Vec<Case> {
    [
        norm::cases(),
        elementwise::cases(),
        linear::cases(),
        rope::cases(),
        attention::cases(),
        delta_inputs::cases(),
        gated_delta::cases(),
        gated_norm::cases(),
        route::cases(),
        moe::cases(),
        cross_entropy::cases(),
        adamw::cases(),
        nf4::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
