//! Tells how far the base weights are: hundreds of GB from a network volume take an hour.

use std::time::{Duration, Instant};

use super::events::{Event, Observer};
use crate::error::Result;
use crate::model::weights::WeightSource;
use crate::store::Weight;
use crate::tensor::Tensor;

/// Time between two words.
const INTERVAL: Duration = Duration::from_secs(10);

/// Passes on weights of `source`, and tells `observer` now and then which layer they are of.
pub(super) struct Watched<'a, S> {
    source: S,
    observer: &'a mut dyn Observer,
    num_layers: usize,
    told: Instant,
}

impl<'a, S> Watched<'a, S> {
    pub(super) fn new(source: S, observer: &'a mut dyn Observer, num_layers: usize) -> Self {
        Self {
            source,
            observer,
            num_layers,
            told: Instant::now(),
        }
    }

    fn pass(&mut self, name: &str) {
        if self.told.elapsed() < INTERVAL {
            return;
        }
        if let Some(layer) = layer_of(name) {
            self.told = Instant::now();
            self.observer.event(&Event::Loading {
                layer: layer + 1,
                num_layers: self.num_layers,
            });
        }
    }
}

/// N of `model.layers.N.self_attn.q_proj`.
fn layer_of(name: &str) -> Option<usize> {
    let (_, rest) = name.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

impl<S: WeightSource> WeightSource for Watched<'_, S> {
    fn matrix(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Weight> {
        self.pass(name);
        self.source.matrix(name, out_features, in_features)
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.pass(name);
        self.source.tensor(name, shape)
    }

    fn experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        intermediate_size: usize,
        hidden_size: usize,
    ) -> Result<[Vec<Weight>; 3]> {
        self.pass(prefix);
        self.source
            .experts(prefix, num_experts, intermediate_size, hidden_size)
    }

    fn place(&mut self, tensor: Tensor) -> Result<Tensor> {
        self.source.place(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::layer_of;

    #[test]
    fn names_tell_their_layer() {
        assert_eq!(layer_of("model.layers.12.mlp.experts"), Some(12));
        assert_eq!(layer_of("model.embed_tokens.weight"), None);
        assert_eq!(layer_of("layers.x.y"), None);
    }
}
