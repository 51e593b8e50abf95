//! CUDA C++ to PTX: NVIDIA's runtime compiler, loaded when it is there. It needs no driver and no device.

use crate::Error;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

type Program = *mut c_void;
type Status = c_int;

/// The library's entry points. They are safe to call from several threads.
pub(crate) struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    size: [unsafe extern "C" fn(Program, *mut usize) -> Status; 2],
    text: [unsafe extern "C" fn(Program, *mut c_char) -> Status; 2],
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    /// Major and minor version.
    pub(crate) version: (i32, i32),
    _library: Library,
}

/// What a program's texts are indexed by in [`Nvrtc`].
#[derive(Clone, Copy)]
enum Text {
    Ptx,
    Log,
}

impl Nvrtc {
    pub(crate) fn load(path: &Path) -> Result<Self, Error> {
        let missing = |source| Error::Library { path: path.to_owned(), source };
        // Safety: NVRTC's initialisers have no requirements, the signatures are those of its header, and the library is
        // kept as long as the pointers into it.
        unsafe {
            let library = Library::new(path).map_err(missing)?;
            macro_rules! symbol {
                ($name:literal) => {
                    *library.get(concat!($name, "\0").as_bytes()).map_err(missing)?
                };
            }
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status = symbol!("nvrtcVersion");
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            Ok(Self {
                create: symbol!("nvrtcCreateProgram"),
                compile: symbol!("nvrtcCompileProgram"),
                size: [symbol!("nvrtcGetPTXSize"), symbol!("nvrtcGetProgramLogSize")],
                text: [symbol!("nvrtcGetPTX"), symbol!("nvrtcGetProgramLog")],
                destroy: symbol!("nvrtcDestroyProgram"),
                version: (major, minor),
                _library: library,
            })
        }
    }

    /// The PTX of `source`, or the compiler's messages.
    pub(crate) fn compile(&self, source: &str, options: &[String]) -> Result<String, String> {
        let source = CString::new(source).map_err(|e| e.to_string())?;
        let options: Vec<_> = options.iter().map(|o| CString::new(o.as_str()).expect("options have no NUL")).collect();
        let options: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // Safety: all strings end with NUL and outlive the calls; the program is destroyed once, after its last use.
        unsafe {
            let status = (self.create)(&mut program, source.as_ptr(), ptr::null(), 0, ptr::null(), ptr::null());
            if status != 0 {
                return Err(format!("nvrtcCreateProgram: status {status}"));
            }
            let status = (self.compile)(program, options.len() as c_int, options.as_ptr());
            let text = if status == 0 { Ok(self.read(program, Text::Ptx)) } else { Err(self.read(program, Text::Log)) };
            (self.destroy)(&mut program);
            text
        }
    }

    /// # Safety
    /// The program must exist and have been compiled.
    unsafe fn read(&self, program: Program, which: Text) -> String {
        let mut size = 0;
        // Safety: the caller's; the buffer is as long as NVRTC asks for, the final NUL included.
        unsafe {
            (self.size[which as usize])(program, &mut size);
            let mut bytes = vec![0u8; size + 1];
            (self.text[which as usize])(program, bytes.as_mut_ptr().cast());
            CStr::from_bytes_until_nul(&bytes).map_or_else(|_| String::new(), |s| s.to_string_lossy().into_owned())
        }
    }
}
