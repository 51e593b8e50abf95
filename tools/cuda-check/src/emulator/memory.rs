//! Memory that ends where no access is allowed.

use std::ops::Range;
use std::ptr;

use cubecl_server::memory_management::WeakMemoryBinding;

const PAGE: usize = 4096;
/// Where a buffer begins at multiples of.
const ALIGNMENT: usize = 16;

pub(crate) struct Memory {
    pages: *mut u8,
    mapped: usize,
    start: *mut u8,
    size: usize,
    holders: WeakMemoryBinding,
}

// Safety: nothing else points to the pages.
unsafe impl Send for Memory {}

impl Memory {
    pub fn new(size: usize, holders: WeakMemoryBinding) -> Self {
        let room = size.next_multiple_of(PAGE);
        let mapped = room + PAGE;
        // Safety: new pages, of which the last is closed.
        unsafe {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let pages = libc::mmap(ptr::null_mut(), mapped, access, kind, -1, 0);
            assert!(pages != libc::MAP_FAILED, "no memory for {size} bytes");
            let pages = pages.cast::<u8>();
            assert_eq!(libc::mprotect(pages.add(room).cast(), PAGE, libc::PROT_NONE), 0);
            Self { pages, mapped, start: pages.add(room - size.next_multiple_of(ALIGNMENT)), size, holders }
        }
    }

    /// Whether someone holds it.
    pub fn in_use(&self) -> bool {
        self.holders.is_alive()
    }

    pub fn at(&self, byte: usize) -> *mut u8 {
        assert!(byte <= self.size);
        // Safety: within the pages.
        unsafe { self.start.add(byte) }
    }

    pub fn bytes(&self, range: Range<u64>) -> &[u8] {
        let (start, end) = (range.start as usize, range.end as usize);
        assert!(start <= end && end <= self.size);
        // Safety: mapped, and all bytes are valid.
        unsafe { std::slice::from_raw_parts(self.at(start), end - start) }
    }

    pub fn write(&mut self, range: Range<u64>, bytes: &[u8]) {
        let start = range.start as usize;
        assert!(start + bytes.len() <= self.size);
        // Safety: within the pages, which overlap nothing else.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(start), bytes.len()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Safety: mapped by `new`.
        unsafe { libc::munmap(self.pages.cast(), self.mapped) };
    }
}
