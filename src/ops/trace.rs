//! What was called: op, cost and, where it is timed, duration.

use std::cell::RefCell;
use std::time::Duration;

use super::cost::Cost;

/// One call of an op.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The op, as `Ops` calls it.
    pub op: &'static str,
    /// Extents of its arguments but the tokens, for a person.
    pub shape: String,
    /// What it costs at least.
    pub cost: Cost,
    /// From launch to end; zero where it is not timed.
    pub elapsed: Duration,
}

/// All calls of one op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpTotal {
    /// The op.
    pub op: &'static str,
    /// Calls.
    pub count: usize,
    /// Sum of their costs.
    pub cost: Cost,
    /// Sum of their durations.
    pub elapsed: Duration,
}

/// What a trace notes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    #[default]
    Off,
    /// Ops and costs.
    Costs,
    /// Durations too: the device is waited for before and after each call, and nothing is recorded for replay.
    Times,
}

/// The calls since [`Self::start`].
#[derive(Debug, Default)]
pub struct Trace {
    state: RefCell<(Mode, Vec<Call>)>,
}

impl Trace {
    /// Forgets all calls; what comes is noted as `mode` says.
    pub fn start(&self, mode: Mode) {
        *self.state.borrow_mut() = (mode, Vec::new());
    }

    /// The calls so far, in order; nothing is noted from here on.
    pub fn stop(&self) -> Vec<Call> {
        std::mem::take(&mut *self.state.borrow_mut()).1
    }

    /// What is noted.
    pub fn mode(&self) -> Mode {
        self.state.borrow().0
    }

    /// Notes `call`.
    pub(super) fn push(&self, call: Call) {
        self.state.borrow_mut().1.push(call);
    }
}

/// Calls summed by op, in the order of first calls.
pub fn by_op(calls: &[Call]) -> Vec<OpTotal> {
    let mut totals: Vec<OpTotal> = Vec::new();
    for call in calls {
        let at = totals.iter().position(|total| total.op == call.op);
        let at = at.unwrap_or_else(|| {
            totals.push(OpTotal {
                op: call.op,
                count: 0,
                cost: Cost::default(),
                elapsed: Duration::ZERO,
            });
            totals.len() - 1
        });
        totals[at].count += 1;
        totals[at].cost += call.cost;
        totals[at].elapsed += call.elapsed;
    }
    totals
}
