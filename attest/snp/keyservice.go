package snp

import (
	"fmt"
	"strings"

	"keybroker/attest"
)

// queryNames are what AMD's key service calls the parts of a TCB (AMD's 57230, section 4.1).
var queryNames = map[string]string{"fmc": "fmcSPL", "bootloader": "blSPL", "tee": "teeSPL", "snp": "snpSPL", "microcode": "ucodeSPL"}

// VCEKPath returns under which path a key service of AMD's shape has the certificate of the VCEK that signed a report: line,
// hardware id and reported TCB. It is "" if the report does not say: those of version 2 do not name the line, others may hide
// the chip, and a VLEK's is for its provider alone.
func VCEKPath(raw []byte) string {
	keys, err := KeysOf(raw)
	if err != nil || versionOf(raw) < withCPUID {
		return ""
	}
	return keys[0].Path()
}

// Path returns under which path a key service of AMD's shape has a VCEK's certificate. It is "" if the key does not say enough,
// and of a VLEK, which only its provider gets from AMD.
func (k Key) Path() string {
	l := lineByName(k.Line)
	if l == nil || k.Kind != attest.VCEK || len(k.Chip) != l.hwid {
		return ""
	}
	var query []string
	for _, p := range l.layout {
		query = append(query, fmt.Sprintf("%s=%d", queryNames[p.name], *p.in(&k.TCB)))
	}
	return fmt.Sprintf("/vcek/v1/%s/%s?%s", l.name, hexOf(k.Chip), strings.Join(query, "&"))
}

// ChainPath returns under which path such a service has the issuers of a line's VCEKs or VLEKs: kind is attest.VCEK or
// attest.VLEK.
func ChainPath(line, kind string) string {
	return fmt.Sprintf("/%s/v1/%s/cert_chain", strings.ToLower(kind), line)
}

// CRLPath returns under which path such a service has the revocation list for these issuers.
func CRLPath(line, kind string) string {
	return fmt.Sprintf("/%s/v1/%s/crl", strings.ToLower(kind), line)
}
