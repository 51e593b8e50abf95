//! Options of the operations: plain structs with builders. Tensors that an operation always needs
//! are its arguments; what may be absent is here.

use burn::Tensor;

use crate::ConvActivation;

/// Which implementation runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Path {
    /// The native kernel where the tensors' backend has one, else the portable body.
    #[default]
    Auto,
    /// The chunked algorithm in plain Burn tensor operations, on any backend.
    Portable,
}

/// Options of the matrix-state recurrences (`gla`, `delta_rule`, ...).
#[derive(Debug, Clone, Default)]
pub struct MatrixOptions {
    /// Factor on the queries; `key_dim^-0.5` if absent.
    pub scale: Option<f64>,
    /// State before the first token, `[N, value_heads, key_dim, value_dim]`; zero if absent.
    pub initial_state: Option<Tensor<4>>,
    /// Boundaries `0 = c_0 < ... < c_N = time` of packed sequences; the batch size must then be 1.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Tokens per chunk; 64 if absent. A matter of speed, not of the result.
    pub chunk: Option<usize>,
    /// Divides `q` and `k` by `sqrt(sum(x^2) + 1e-6)` over the key dimension first.
    pub qk_l2norm: bool,
    /// Which implementation runs.
    pub path: Path,
}

impl MatrixOptions {
    /// The defaults: scale `key_dim^-0.5`, zero state, no packing, chunks of 64.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the factor on the queries.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the state before the first token.
    pub fn with_initial_state(mut self, state: Tensor<4>) -> Self {
        self.initial_state = Some(state);
        self
    }

    /// Sets the boundaries of packed sequences.
    pub fn with_cu_seqlens(mut self, cu_seqlens: Vec<usize>) -> Self {
        self.cu_seqlens = Some(cu_seqlens);
        self
    }

    /// Sets the number of tokens per chunk.
    pub fn with_chunk(mut self, chunk: usize) -> Self {
        self.chunk = Some(chunk);
        self
    }

    /// Turns the l2 normalisation of queries and keys on or off.
    pub fn with_qk_l2norm(mut self, on: bool) -> Self {
        self.qk_l2norm = on;
        self
    }

    /// Chooses the implementation.
    pub fn with_path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }
}

/// Options of the single-token steps of the matrix-state recurrences.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepOptions {
    /// Factor on the queries; `key_dim^-0.5` if absent.
    pub scale: Option<f64>,
    /// Divides `q` and `k` by `sqrt(sum(x^2) + 1e-6)` over the key dimension first.
    pub qk_l2norm: bool,
    /// Which implementation runs.
    pub path: Path,
}

impl StepOptions {
    /// The defaults: scale `key_dim^-0.5`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the factor on the queries.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Turns the l2 normalisation of queries and keys on or off.
    pub fn with_qk_l2norm(mut self, on: bool) -> Self {
        self.qk_l2norm = on;
        self
    }

    /// Chooses the implementation.
    pub fn with_path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }
}

/// Options of the element-wise recurrences (`linear_scan`, `hgrn`, `rg_lru`).
#[derive(Debug, Clone, Default)]
pub struct ScanOptions {
    /// State before the first token, `[N, channels]`; zero if absent.
    pub initial_state: Option<Tensor<2>>,
    /// Boundaries `0 = c_0 < ... < c_N = time` of packed sequences; the batch size must then be 1.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Which implementation runs.
    pub path: Path,
}

impl ScanOptions {
    /// The defaults: zero state, no packing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the state before the first token.
    pub fn with_initial_state(mut self, state: Tensor<2>) -> Self {
        self.initial_state = Some(state);
        self
    }

    /// Sets the boundaries of packed sequences.
    pub fn with_cu_seqlens(mut self, cu_seqlens: Vec<usize>) -> Self {
        self.cu_seqlens = Some(cu_seqlens);
        self
    }

    /// Chooses the implementation.
    pub fn with_path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }
}

/// Options of [`complex_scan`](crate::complex_scan).
#[derive(Debug, Clone, Default)]
pub struct ComplexScanOptions {
    /// Real and imaginary part of the state before the first token, `[N, channels]` each.
    pub initial_state: Option<(Tensor<2>, Tensor<2>)>,
    /// Boundaries `0 = c_0 < ... < c_N = time` of packed sequences; the batch size must then be 1.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Which implementation runs.
    pub path: Path,
}

impl ComplexScanOptions {
    /// The defaults: zero state, no packing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the state before the first token.
    pub fn with_initial_state(mut self, re: Tensor<2>, im: Tensor<2>) -> Self {
        self.initial_state = Some((re, im));
        self
    }

    /// Sets the boundaries of packed sequences.
    pub fn with_cu_seqlens(mut self, cu_seqlens: Vec<usize>) -> Self {
        self.cu_seqlens = Some(cu_seqlens);
        self
    }

    /// Chooses the implementation.
    pub fn with_path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }
}

/// Options of [`short_conv`](crate::short_conv).
#[derive(Debug, Clone, Default)]
pub struct ShortConvOptions {
    /// What follows the convolution.
    pub activation: ConvActivation,
    /// The `W - 1` inputs before the first token, oldest first, `[N, channels, W - 1]`; zero if absent.
    pub initial_state: Option<Tensor<3>>,
    /// Boundaries `0 = c_0 < ... < c_N = time` of packed sequences; the batch size must then be 1.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Which implementation runs.
    pub path: Path,
}

impl ShortConvOptions {
    /// The defaults: no activation, zero state, no packing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what follows the convolution.
    pub fn with_activation(mut self, activation: ConvActivation) -> Self {
        self.activation = activation;
        self
    }

    /// Sets the inputs before the first token.
    pub fn with_initial_state(mut self, state: Tensor<3>) -> Self {
        self.initial_state = Some(state);
        self
    }

    /// Sets the boundaries of packed sequences.
    pub fn with_cu_seqlens(mut self, cu_seqlens: Vec<usize>) -> Self {
        self.cu_seqlens = Some(cu_seqlens);
        self
    }

    /// Chooses the implementation.
    pub fn with_path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }
}

/// Options of [`attention`](crate::attention).
#[derive(Debug, Clone, Default)]
pub struct AttentionOptions {
    /// Token `i` sees the tokens `i - window + 1 ..= i`; all earlier ones if absent.
    pub window: Option<usize>,
    /// Factor on the scores; `head_dim^-0.5` if absent.
    pub scale: Option<f64>,
    /// Boundaries `0 = c_0 < ... < c_N = time` of packed sequences; the batch size must then be 1.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Which implementation runs.
    pub path: Path,
}

impl AttentionOptions {
    /// The defaults: full causal attention, scale `head_dim^-0.5`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the number of tokens that each token sees, itself included.
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = Some(window);
        self
    }

    /// Sets the factor on the scores.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the boundaries of packed sequences.
    pub fn with_cu_seqlens(mut self, cu_seqlens: Vec<usize>) -> Self {
        self.cu_seqlens = Some(cu_seqlens);
        self
    }

    /// Chooses the implementation.
    pub fn with_path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }
}
