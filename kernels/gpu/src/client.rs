//! A device and what its kernels are allowed.

use std::fmt;
use std::ops::Deref;

use cubecl::client::Client as CubeClient;

/// What the kernels of a [`Client`] are allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Whether products of f32 tensors may round their operands to tf32, which has 10 bits after the leading one, on devices
    /// with matrix units for it: faster, with errors of 1e-3 in the place of 1e-6.
    pub tf32: bool,
    /// For tests: fills every output with NaN before its kernel runs, so that an element which no kernel writes is found.
    #[doc(hidden)]
    pub poison_outputs: bool,
    /// For tests: indexes with 64 bits however short the buffers are.
    #[doc(hidden)]
    pub wide_addresses: bool,
}

/// A CubeCL client with [`Options`]. It dereferences to the client; `from` makes one with the default options.
#[derive(Clone)]
pub struct Client {
    client: CubeClient,
    options: Options,
}

impl Client {
    /// The same device with other options.
    #[must_use]
    pub fn with_options(self, options: Options) -> Self {
        Self { options, ..self }
    }

    /// The same device, on which products of f32 tensors may use tf32; see [`Options::tf32`].
    #[must_use]
    pub fn with_tf32(self, allowed: bool) -> Self {
        let options = Options { tf32: allowed, ..self.options };
        self.with_options(options)
    }

    /// For tests: the same device with outputs that are NaN until a kernel writes them.
    #[doc(hidden)]
    #[must_use]
    pub fn with_poisoned_outputs(self) -> Self {
        let options = Options { poison_outputs: true, ..self.options };
        self.with_options(options)
    }

    /// For tests: the same device with 64-bit indices.
    #[doc(hidden)]
    #[must_use]
    pub fn with_wide_addresses(self) -> Self {
        let options = Options { wide_addresses: true, ..self.options };
        self.with_options(options)
    }

    /// The options.
    pub fn options(&self) -> Options {
        self.options
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("device", &self.client.properties().identity.name)
            .field("options", &self.options)
            .finish()
    }
}

impl From<CubeClient> for Client {
    fn from(client: CubeClient) -> Self {
        Self { client, options: Options::default() }
    }
}

impl Deref for Client {
    type Target = CubeClient;

    fn deref(&self) -> &CubeClient {
        &self.client
    }
}
