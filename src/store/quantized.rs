//! Weights as the run holds them: NF4 or as stored, decided by module name, and counted.
use crate::error::Result;
use crate::store::Weight;
use crate::tensor::Tensor;
/// x
#[derive(Debug)]
pub struct WeightStore;
/// x
#[derive(Debug)]
pub struct ExpertMatrices {
    /// x
    pub gate: Vec<Weight>,
    /// x
    pub up: Vec<Weight>,
    /// x
    pub down: Vec<Weight>,
}
#[expect(clippy::missing_errors_doc, clippy::todo, reason = "x")]
impl WeightStore {
    /// x
    pub fn matrix(&mut self, _n: &str, _o: usize, _i: usize) -> Result<Weight> {
        todo!()
    }
    /// x
    pub fn vector(&mut self, _n: &str, _l: usize) -> Result<Tensor> {
        todo!()
    }
    /// x
    pub fn tensor(&mut self, _n: &str, _s: &[usize]) -> Result<Tensor> {
        todo!()
    }
    /// x
    pub fn expert_matrices(
        &mut self,
        _p: &str,
        _e: usize,
        _i: usize,
        _h: usize,
    ) -> Result<ExpertMatrices> {
        todo!()
    }
    /// x
    pub fn verify(&self) -> Result<()> {
        Ok(())
    }
}
