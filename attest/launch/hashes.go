package launch

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strings"
)

// The tables with hashes that QEMU makes and the firmware reads.
var (
	guidHashes  = guid("9438d606-4f22-4cc9-b479-a793d411fd21")
	guidCommand = guid("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
	guidInitrd  = guid("44baf731-3a2f-4bd7-9af1-41e29169781d")
	guidKernel  = guid("4de79437-abd2-427f-b835-d5b172d2045b")
)

// guid returns the octets of a GUID as firmware stores it: its first three parts little-endian.
func guid(text string) [16]byte {
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(b) != 16 {
		panic("launch: bad GUID " + text)
	}
	for _, part := range [][]byte{b[0:4], b[4:6], b[6:8]} {
		for i, j := 0, len(part)-1; i < j; i, j = i+1, j-1 {
			part[i], part[j] = part[j], part[i]
		}
	}
	return [16]byte(b)
}

// page returns the page with the hashes, which stand at an offset in it.
func (b *Boot) page(offset uint32) []byte {
	table := b.table()
	if int(offset)+len(table) > pageSize {
		table = nil // no firmware has this; the digest will be of no use, but nothing is written beyond the page
	}
	page := make([]byte, pageSize)
	copy(page[offset:], table)
	return page
}

// table lists the hashes of command line, initrd and kernel, each with its GUID and length.
func (b *Boot) table() []byte {
	var entries bytes.Buffer
	for _, e := range []struct {
		guid [16]byte
		hash [sha256.Size]byte
	}{{guidCommand, sha256.Sum256([]byte(b.Append + "\x00"))}, {guidInitrd, b.Initrd}, {guidKernel, b.Kernel}} {
		appendEntry(&entries, e.guid, e.hash[:])
	}
	var table bytes.Buffer
	appendEntry(&table, guidHashes, entries.Bytes())
	return table.Bytes()
}

func appendEntry(to *bytes.Buffer, guid [16]byte, content []byte) {
	to.Write(guid[:])
	to.Write(binary.LittleEndian.AppendUint16(nil, uint16(len(guid)+2+len(content))))
	to.Write(content)
}
