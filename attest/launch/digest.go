// Package launch is the launch of an SNP guest as its owner prepares it: the measurement that it will have, and the ID block that
// the firmware holds it against.
//
// Section numbers are those of AMD's publication 56860 ("SNP ABI"). What QEMU puts into a guest's memory, and OVMF's tables, are as
// QEMU's and OVMF's sources have them.
package launch

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
)

// A Digest is a launch digest, MEASUREMENT in a report.
type Digest = [sha512.Size384]byte

// Sizes in octets.
const (
	pageSize = 4096
	size4GiB = 1 << 32
)

// MaxVCPUs is how many virtual processors a guest may have here.
const MaxVCPUs = 4096

// The types of pages (SNP ABI, section 8.17, table PAGE_TYPE).
const (
	pageNormal  = 1
	pageVMSA    = 2
	pageZero    = 3
	pageSecrets = 5
	pageCPUID   = 6
)

// vmsaAddress is where VMSAs are, for the digest.
const vmsaAddress = 0xfffffffff000

// A chain is a launch digest while pages are added.
type chain struct{ digest Digest }

// add extends the digest by one page (SNP ABI, section 8.17, structure PAGE_INFO). Contents is the page's SHA-384, zeros for a
// page whose contents the firmware makes itself.
func (c *chain) add(kind byte, address uint64, contents [sha512.Size384]byte) {
	var info [0x70]byte
	copy(info[:], c.digest[:])
	copy(info[48:], contents[:])
	binary.LittleEndian.PutUint16(info[96:], uint16(len(info)))
	info[98] = kind // behind it no IMI, and no permissions for VMPL 1 to 3
	binary.LittleEndian.PutUint64(info[104:], address)
	c.digest = sha512.Sum384(info[:])
}

// data adds whole pages.
func (c *chain) data(kind byte, address uint64, pages []byte) {
	for len(pages) > 0 {
		c.add(kind, address, sha512.Sum384(pages[:pageSize]))
		pages, address = pages[pageSize:], address+pageSize
	}
}

// empty adds pages whose contents the firmware makes.
func (c *chain) empty(kind byte, address, size uint64) {
	for end := address + size; address < end; address += pageSize {
		c.add(kind, address, [sha512.Size384]byte{})
	}
}

// Boot is what QEMU measures for a guest that is started with -kernel: the files' hashes are put where the firmware looks for
// them.
type Boot struct {
	Kernel [sha256.Size]byte // SHA-256 of the file
	Initrd [sha256.Size]byte // SHA-256 of the file; without one, of nothing
	Append string            // the command line
}

// A Guest is what decides on a launch digest.
type Guest struct {
	Firmware []byte // OVMF, whole pages
	Boot     *Boot  // nil: the guest boots from a disk
	CPU      uint32 // the signature of its processors, see Signature
	Features uint64 // SEV_FEATURES of each VMSA: 1 is SNP alone
}

// Digests returns the launch digest for each number of processors from least to most. What they have in common is computed
// once.
func (g *Guest) Digests(least, most int) ([]Digest, error) {
	if least < 1 || most < least || most > MaxVCPUs {
		return nil, fmt.Errorf("expected 1 to %d processors, least first, got %d to %d", MaxVCPUs, least, most)
	}
	if g.Features&1 == 0 {
		return nil, errors.New("expected guest features with bit 0, which is SNP itself")
	}
	f, err := parseFirmware(g.Firmware)
	if err != nil {
		return nil, err
	}
	var c chain
	c.data(pageNormal, size4GiB-uint64(len(g.Firmware)), g.Firmware)
	if err := g.addSections(&c, f); err != nil {
		return nil, err
	}
	return g.addProcessors(c, f, least, most)
}

// addProcessors adds one VMSA after another.
func (g *Guest) addProcessors(c chain, f *firmware, least, most int) ([]Digest, error) {
	if most > 1 && !f.hasReset {
		return nil, errors.New("this firmware does not say where further processors start; expected one that was built for SEV-ES")
	}
	boot, other := sha512.Sum384(vmsa(resetVector, g.CPU, g.Features)), sha512.Sum384(vmsa(f.reset, g.CPU, g.Features))
	var out []Digest
	for n := 1; n <= most; n++ {
		page := other
		if n == 1 {
			page = boot
		}
		c.add(pageVMSA, vmsaAddress, page)
		if n >= least {
			out = append(out, c.digest)
		}
	}
	return out, nil
}

// addSections adds what the firmware's metadata asks for, in its order.
func (g *Guest) addSections(c *chain, f *firmware) error {
	hashed := false
	for _, s := range f.sections {
		switch s.kind {
		case sectionMemory, sectionSVSM:
			c.empty(pageZero, s.address, s.size)
		case sectionSecrets:
			c.empty(pageSecrets, s.address, pageSize)
		case sectionCPUID:
			c.empty(pageCPUID, s.address, pageSize)
		case sectionHashes:
			if g.Boot == nil {
				c.empty(pageZero, s.address, s.size)
				continue
			}
			if !f.hasHashes || s.size != pageSize {
				return errors.New("this firmware does not say where in a page hashes belong")
			}
			c.data(pageNormal, s.address, g.Boot.page(f.hashes%pageSize))
			hashed = true
		default:
			return fmt.Errorf("the firmware's metadata has a section of the unknown type %#x", s.kind)
		}
	}
	if g.Boot != nil && !hashed {
		return errors.New("this firmware does not check the kernel: expected one with a section for hashes (OvmfPkg/AmdSev), or no kernel")
	}
	return nil
}
