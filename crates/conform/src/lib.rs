//! Runs reference cases in safetensors files through any implementation and reports the error.
