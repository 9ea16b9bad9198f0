package snp

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-sev-guest/abi"

	"keybroker/attest"
)

// Bounds of what is looked at. They are far above what there is: a report with all its certificates has some 7 KiB.
const (
	MaxExtended     = 64 << 10 // octets of an extended report: a report with its table
	maxTableEntries = 32
	maxCertificates = 64       // of one appraisal, wherever they come from
	maxCertificate  = 16 << 10 // octets
	maxCRLs         = 16
	maxCRL          = 256 << 10 // octets
)

// errTable is in the chain of errors about a table of certificates.
var errTable = errors.New("malformed certificate table")

// endorsementGUIDs are the entries of a table that hold certificates or a revocation list (GHCB specification, section "SNP
// Extended Guest Request"). An ASVK comes as an ASK.
var endorsementGUIDs = []string{
	abi.VcekGUID, abi.VlekGUID, abi.AskGUID, abi.ArkGUID,
	"92f81bc3-5811-4d3d-97ff-d19f88dc67ea", // CRL
}

// split takes evidence apart into the report and the table behind it.
func split(octets []byte) (report, table []byte) {
	n := min(len(octets), ReportSize)
	return octets[:n], octets[n:]
}

// An entry is one blob of a table.
type entry struct {
	guid string // in the usual form, lower case
	blob []byte
}

// ParseTable reads the certificates and revocation lists in a table as a hypervisor hands it to a guest (GHCB specification,
// section "SNP Extended Guest Request"): what configfs-tsm gives as auxblob, and what follows the report in an extended report.
// Entries of unknown kinds are passed over. Each entry may be DER or PEM. An empty table is empty.
func ParseTable(table []byte) (attest.Endorsements, error) {
	var out attest.Endorsements
	entries, err := parseEntries(table)
	if err != nil {
		return out, err
	}
	for _, e := range entries {
		switch {
		case len(e.blob) == 0:
		case isEndorsement(e.guid):
			more, err := parseBlob(e.blob)
			if err != nil {
				return attest.Endorsements{}, fmt.Errorf("%w: entry %s: %w", errTable, e.guid, err)
			}
			out = join(out, more)
		}
	}
	return out, nil
}

func isEndorsement(guid string) bool { return slices.Contains(endorsementGUIDs, guid) }

// guidOf returns the usual form of a GUID, whose octets tables hold in that order.
func guidOf(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:abi.GUIDSize])
}

// parseEntries reads a table's header, which ends with an entry of zeros, and cuts the blobs out. All sums are done in 64 bits:
// offset and length are the peer's.
func parseEntries(table []byte) ([]entry, error) {
	var out []entry
	for at := 0; len(table) > 0; at += abi.CertTableEntrySize {
		if len(table)-at < abi.CertTableEntrySize {
			return nil, fmt.Errorf("%w: no end of its header within %d octets", errTable, len(table))
		}
		head := table[at : at+abi.CertTableEntrySize]
		if isZero(head) {
			return out, checkOffsets(table, at+abi.CertTableEntrySize)
		}
		if len(out) == maxTableEntries {
			return nil, fmt.Errorf("%w: expected at most %d entries", errTable, maxTableEntries)
		}
		offset, length := place(head)
		if offset+length > uint64(len(table)) {
			return nil, fmt.Errorf("%w: entry %d has %d octets from %d on, the table has %d", errTable, len(out)+1, length, offset, len(table))
		}
		out = append(out, entry{guidOf(head), table[offset : offset+length]})
	}
	return nil, nil
}

// place returns where the blob of an entry is.
func place(head []byte) (offset, length uint64) {
	return uint64(binary.LittleEndian.Uint32(head[16:])), uint64(binary.LittleEndian.Uint32(head[20:]))
}

// checkOffsets holds that no blob is within the header.
func checkOffsets(table []byte, header int) error {
	for at := 0; at < header-abi.CertTableEntrySize; at += abi.CertTableEntrySize {
		if offset, _ := place(table[at:]); offset < uint64(header) {
			return fmt.Errorf("%w: an entry begins at %d, within the header of %d octets", errTable, offset, header)
		}
	}
	return nil
}

// parseBlob takes one certificate or revocation list in DER, or any number of certificates and revocation lists in PEM.
func parseBlob(blob []byte) (attest.Endorsements, error) {
	var out attest.Endorsements
	if !bytes.HasPrefix(bytes.TrimLeft(blob, " \t\r\n"), []byte("-----BEGIN ")) {
		return parseDER(blob)
	}
	for {
		var block *pem.Block
		if block, blob = pem.Decode(blob); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			out.Certificates = append(out.Certificates, block.Bytes)
		case "X509 CRL":
			out.CRLs = append(out.CRLs, block.Bytes)
		default:
			return attest.Endorsements{}, fmt.Errorf("expected PEM of type CERTIFICATE or X509 CRL, got %.40q", block.Type)
		}
	}
	if len(out.Certificates)+len(out.CRLs) == 0 {
		return out, errors.New("expected PEM with certificates, got none")
	}
	return out, nil
}

// parseDER takes one certificate or one revocation list. What is neither is kept as a certificate, which its appraisal refuses.
func parseDER(blob []byte) (attest.Endorsements, error) {
	der, err := trimDER(blob)
	if err != nil {
		return attest.Endorsements{}, err
	}
	if _, err := x509.ParseRevocationList(der); err == nil {
		return attest.Endorsements{CRLs: [][]byte{der}}, nil
	}
	return attest.Endorsements{Certificates: [][]byte{der}}, nil
}

// trimDER cuts off the zeros that some hypervisors leave behind a certificate.
func trimDER(blob []byte) ([]byte, error) {
	size, ok := derSize(blob)
	if !ok || size > len(blob) || !isZero(blob[size:]) {
		return nil, errors.New("expected a certificate in DER or PEM")
	}
	return blob[:size], nil
}

// derSize returns how many octets a SEQUENCE of up to 16 MiB has, with its head.
func derSize(b []byte) (int, bool) {
	switch {
	case len(b) < 5 || b[0] != 0x30:
		return 0, false
	case b[1] < 0x80:
		return 2 + int(b[1]), true
	case b[1] == 0x81:
		return 3 + int(b[2]), true
	case b[1] == 0x82:
		return 4 + int(b[2])<<8 + int(b[3]), true
	case b[1] == 0x83:
		return 5 + int(b[2])<<16 + int(b[3])<<8 + int(b[4]), true
	}
	return 0, false
}

// join puts what two sources have into one.
func join(a, b attest.Endorsements) attest.Endorsements {
	return attest.Endorsements{Certificates: append(a.Certificates, b.Certificates...), CRLs: append(a.CRLs, b.CRLs...)}
}

// ParseFile reads the certificates and revocation lists of a file in any form in which they come: DER, PEM, or a table. An empty
// file has none: that is what configfs-tsm gives as auxblob on a host that hands out no certificates.
func ParseFile(data []byte) (attest.Endorsements, error) {
	if out, err := parseBlob(data); err == nil {
		return out, nil
	}
	out, err := ParseTable(data)
	if err != nil {
		return attest.Endorsements{}, fmt.Errorf("expected certificates in DER, in PEM, or in a table as configfs-tsm gives it as auxblob: %w", err)
	}
	return out, nil
}
