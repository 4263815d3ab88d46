//! PLT stubs: the short jumps through the GOT by which a module calls what it imports.

use super::Inner;
use dyni_schema::LinkAddr;

/// Finds `[endbr64] [bnd] jmp [rip + slot]` for every slot that a relocation names, in the `.plt*` sections, or, where
/// there are no section headers, in all executable bytes. Such a jump elsewhere (`-fno-plt` tail calls) is not a stub.
pub(super) fn stubs(image: &Inner, data: &[u8]) -> Vec<(u32, u32)> {
    let mut found = Vec::new();
    if image.tables.slots.is_empty() {
        return found;
    }
    let sections: Vec<_> = image
        .sections
        .iter()
        .filter(|s| s.executable && s.name.starts_with(".plt"))
        .map(|s| (s.address, s.size as usize))
        .collect();
    if sections.is_empty() {
        for s in image.segments.iter().filter(|s| s.executable) {
            scan(image, data, s.address, s.file_size as usize, true, &mut found);
        }
    }
    for (start, size) in sections {
        scan(image, data, start, size, false, &mut found);
    }
    found.sort_unstable();
    found.dedup_by_key(|s| s.0);
    found
}

fn scan(image: &Inner, data: &[u8], start: LinkAddr, size: usize, guess: bool, found: &mut Vec<(u32, u32)>) {
    let Some(bytes) = image.bytes_from(data, start) else { return };
    let bytes = &bytes[..bytes.len().min(size)];
    let mut i = 0;
    while i + 6 <= bytes.len() {
        if bytes[i] != 0xff || bytes[i + 1] != 0x25 {
            i += 1;
            continue;
        }
        let disp = i32::from_le_bytes([bytes[i + 2], bytes[i + 3], bytes[i + 4], bytes[i + 5]]);
        let slot = start.plus(i as u64 + 6).offset(i64::from(disp));
        let named = image.offset_of(slot.0).filter(|o| image.tables.slots.binary_search_by_key(o, |s| s.0).is_ok());
        let mut head = i;
        if head >= 1 && bytes[head - 1] == 0xf2 {
            head -= 1;
        }
        if bytes[..head].ends_with(&[0xf3, 0x0f, 0x1e, 0xfa]) {
            head -= 4;
        }
        let at = start.plus(head as u64);
        if let (Some(slot), Some(offset)) = (named, image.offset_of(at.0))
            && (!guess || at.0.is_multiple_of(8))
        {
            found.push((offset, slot));
        }
        i += 6;
    }
}
