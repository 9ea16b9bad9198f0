package launch

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// MaxFirmware is how many octets a firmware may have.
const MaxFirmware = 64 << 20

// The tables at the end of OVMF (OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm).
var (
	guidFooter   = guid("96b582de-1fb2-45f7-baea-a366c55a082d")
	guidHashesAt = guid("7255371f-3a3b-4b04-927b-1da6efa8d454")
	guidReset    = guid("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
	guidMetadata = guid("dc886566-984a-4798-a75e-5585a7bf67cc")
)

// The sections that the metadata of OVMF lists (OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm).
const (
	sectionMemory  = 1
	sectionSecrets = 2
	sectionCPUID   = 3
	sectionSVSM    = 4
	sectionHashes  = 0x10
)

// maxSections bounds how many sections a firmware may list, and maxSection how large each may be.
const (
	maxSections = 256
	maxSection  = 16 << 20
)

// A section is memory of the guest that is filled before it starts.
type section struct {
	address, size uint64
	kind          uint32
}

// A firmware is what OVMF says of itself.
type firmware struct {
	sections  []section
	hashes    uint32 // where the table of hashes belongs
	hasHashes bool
	reset     uint32 // where further processors start
	hasReset  bool
}

// parseFirmware reads the tables at the end of a firmware.
func parseFirmware(octets []byte) (*firmware, error) {
	if len(octets) == 0 || len(octets)%pageSize != 0 || len(octets) > MaxFirmware {
		return nil, fmt.Errorf("reading firmware: expected whole pages of %d octets, up to %d octets, got %d octets", pageSize, MaxFirmware, len(octets))
	}
	tables, err := parseFooter(octets)
	if err != nil {
		return nil, fmt.Errorf("reading firmware: %w", err)
	}
	f := &firmware{}
	f.hashes, f.hasHashes = number(tables[guidHashesAt])
	f.reset, f.hasReset = number(tables[guidReset])
	offset, ok := number(tables[guidMetadata])
	if !ok {
		return nil, errors.New("reading firmware: it has no metadata for SNP; expected OVMF with SNP support")
	}
	if f.sections, err = parseMetadata(octets, offset); err != nil {
		return nil, fmt.Errorf("reading firmware's metadata: %w", err)
	}
	return f, nil
}

// number reads the number at the beginning of a table.
func number(table []byte) (uint32, bool) {
	if len(table) < 4 {
		return 0, false
	}
	return binary.LittleEndian.Uint32(table), true
}

// entryHead is how many octets length and GUID of a table have. They stand behind it: the list is read from its end.
const entryHead = 2 + 16

// footerEnd is how many octets lie behind the footer.
const footerEnd = 32

// parseFooter returns the contents of the tables by their GUIDs.
func parseFooter(octets []byte) (map[[16]byte][]byte, error) {
	list := octets[:len(octets)-footerEnd]
	all, id, _, ok := lastEntry(list)
	if !ok || id != guidFooter {
		return nil, errors.New("its end has no table of OVMF's")
	}
	tables := map[[16]byte][]byte{}
	for len(all) > 0 {
		content, id, rest, ok := lastEntry(all)
		if !ok {
			return nil, errors.New("a length in its tables is wrong")
		}
		tables[id], all = content, rest
	}
	return tables, nil
}

// lastEntry takes the last table of a list: its content, its GUID, and the list before it.
func lastEntry(list []byte) (content []byte, id [16]byte, rest []byte, ok bool) {
	if len(list) < entryHead {
		return nil, id, nil, false
	}
	head := len(list) - entryHead
	size := int(binary.LittleEndian.Uint16(list[head:]))
	if size < entryHead || size > len(list) {
		return nil, id, nil, false
	}
	begin := len(list) - size
	return list[begin:head], [16]byte(list[head+2:]), list[:begin], true
}

// parseMetadata reads the list of sections, which begins so many octets before the end.
func parseMetadata(octets []byte, fromEnd uint32) ([]section, error) {
	const head, item = 16, 12
	if uint64(fromEnd) > uint64(len(octets)) || fromEnd < head {
		return nil, fmt.Errorf("it begins %d octets before the end of %d", fromEnd, len(octets))
	}
	list := octets[len(octets)-int(fromEnd):]
	version, count := binary.LittleEndian.Uint32(list[8:]), binary.LittleEndian.Uint32(list[12:])
	if string(list[:4]) != "ASEV" || version != 1 {
		return nil, fmt.Errorf("expected ASEV, version 1, got %.8q, version %d", list[:4], version)
	}
	if count > maxSections || uint64(count)*item > uint64(len(list)-head) {
		return nil, fmt.Errorf("expected at most %d sections within the file, got %d", maxSections, count)
	}
	var out []section
	for i := range int(count) {
		at := list[head+i*item:]
		s := section{uint64(binary.LittleEndian.Uint32(at)), uint64(binary.LittleEndian.Uint32(at[4:])), binary.LittleEndian.Uint32(at[8:])}
		if s.address%pageSize != 0 || s.size%pageSize != 0 || s.size > maxSection {
			return nil, fmt.Errorf("section %d: expected whole pages, up to %d octets, got %d octets at %#x", i+1, maxSection, s.size, s.address)
		}
		out = append(out, s)
	}
	return out, nil
}
