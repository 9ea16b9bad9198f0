package launch

import (
	"encoding/binary"
	"fmt"
	"regexp"
)

// resetVector is where the first processor starts.
const resetVector = 0xfffffff0

// vmsa returns the save area of a virtual processor as QEMU and KVM make it before its first instruction (AMD64 Architecture
// Programmer's Manual, volume 2, appendix B, table B-4).
func vmsa(entry, signature uint32, features uint64) []byte {
	page := make([]byte, pageSize)
	segment := func(at int, selector, attributes uint16, base uint64) {
		binary.LittleEndian.PutUint16(page[at:], selector)
		binary.LittleEndian.PutUint16(page[at+2:], attributes)
		binary.LittleEndian.PutUint32(page[at+4:], 0xffff)
		binary.LittleEndian.PutUint64(page[at+8:], base)
	}
	for _, at := range []int{0x00, 0x20, 0x30, 0x40, 0x50} { // ES, SS, DS, FS, GS
		segment(at, 0, 0x93, 0)
	}
	segment(0x10, 0xf000, 0x9b, uint64(entry&0xffff0000)) // CS
	segment(0x60, 0, 0, 0)                                // GDTR
	segment(0x70, 0, 0x82, 0)                             // LDTR
	segment(0x80, 0, 0, 0)                                // IDTR
	segment(0x90, 0, 0x8b, 0)                             // TR
	for at, value := range map[int]uint64{
		0x0d0: 0x1000,                 // EFER: KVM sets SVME
		0x148: 0x40,                   // CR4: KVM sets MCE
		0x158: 0x10,                   // CR0
		0x160: 0x400,                  // DR7
		0x168: 0xffff0ff0,             // DR6
		0x170: 2,                      // RFLAGS
		0x178: uint64(entry & 0xffff), // RIP
		0x268: 0x7040600070406,        // G_PAT
		0x310: uint64(signature),      // RDX: family, model and stepping
		0x3b0: features,               // SEV_FEATURES
		0x3e8: 1,                      // XCR0
	} {
		binary.LittleEndian.PutUint64(page[at:], value)
	}
	binary.LittleEndian.PutUint32(page[0x408:], 0x1f80) // MXCSR
	binary.LittleEndian.PutUint16(page[0x410:], 0x37f)  // the x87 control word
	return page
}

// typeName is how QEMU names processors: a model and perhaps a version of it.
var typeName = regexp.MustCompile(`^(EPYC(?:-[A-Z][A-Za-z]+)?)(?:-v[0-9]{1,2})?$`)

// types are QEMU's processors by family, model and stepping. All versions of one are alike in these.
var types = map[string][3]uint32{
	"EPYC": {0x17, 1, 2}, "EPYC-IBPB": {0x17, 1, 2}, "EPYC-Rome": {0x17, 0x31, 0}, "EPYC-Milan": {0x19, 1, 1}, "EPYC-Genoa": {0x19, 0x11, 0},
	"EPYC-Turin": {0x1a, 0, 0},
}

// Signature returns what CPUID says of a processor of QEMU's (Fn0000_0001_EAX), "EPYC-v4" for example.
func Signature(name string) (uint32, error) {
	m := typeName.FindStringSubmatch(name)
	if m == nil || types[m[1]] == [3]uint32{} {
		return 0, fmt.Errorf("expected a processor of QEMU's: EPYC, EPYC-Rome, EPYC-Milan, EPYC-Genoa or EPYC-Turin, perhaps with a version (EPYC-v4), got %.40q", name)
	}
	family, model, stepping := types[m[1]][0], types[m[1]][1], types[m[1]][2]
	return (family-0xf)<<20 | model>>4<<16 | 0xf<<8 | model&0xf<<4 | stepping, nil
}
